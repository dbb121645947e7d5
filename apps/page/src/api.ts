/** The server's public API: its models, and answers as they are written. */

import { signal } from "@preact/signals";
import { EventSourceParserStream } from "eventsource-parser/stream";
import type { Model } from "./models";

/** What a person is told of a request that failed. */
export class Problem extends Error {}

/** What an answer cost; null where the server did not say. */
export interface Figures {
  promptTokens: number | null;
  imageTokens: number | null;
  cachedTokens: number | null;
  tokens: number | null;
  /** Seconds to the first token. */
  firstToken: number | null;
  /** Tokens a second, from the first token on. */
  rate: number | null;
}

export interface Piece {
  text: string;
  finish: string | null;
  figures: Figures | null;
}

const KEY = "mm1-key";
/** Where the key is asked for; null while it is not. */
export const keyWanted = signal<{
  wrong: boolean;
  give(key: string | null): void;
} | null>(null);
let key = readKey();
let asked: Promise<void> | null = null;

function readKey(): string | null {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null; // Storage is off.
  }
}

function keepKey(given: string): void {
  key = given;
  try {
    sessionStorage.setItem(KEY, given);
  } catch {
    // Kept until the page is left.
  }
}

/** Resolves with a key given; several requests that lack one ask once. */
function askKey(wrong: boolean): Promise<void> {
  asked ??= new Promise<void>((resolve, reject) => {
    const give = (given: string | null) => {
      // A dialog that is gone tells once more that it was closed.
      if (keyWanted.value?.give !== give) return;
      asked = null;
      keyWanted.value = null;
      if (given === null) reject(new Problem("The server wants an API key."));
      else {
        keepKey(given);
        resolve();
      }
    };
    keyWanted.value = { wrong, give };
  });
  return asked;
}

async function call(path: string, init: RequestInit = {}): Promise<Response> {
  for (;;) {
    const used = key;
    const headers = new Headers(init.headers);
    if (used) headers.set("Authorization", `Bearer ${used}`);
    const response = await reach(path, { ...init, headers });
    if (response.ok) return response;
    if (response.status !== 401) throw new Problem(await reason(response));
    // Another request may have been given one meanwhile.
    if (used === key) await askKey(used !== null);
  }
}

async function reach(path: string, init: RequestInit): Promise<Response> {
  try {
    return await fetch(path, init);
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new Problem("The server cannot be reached. Is mm1 serve still running?");
  }
}

/** A refusal in words. */
async function reason(response: Response): Promise<string> {
  const said = await response.json().then(
    (body) => body?.error?.message,
    () => null,
  );
  const words = sentence(said || `The server answered with status ${response.status}`);
  const wait = Number(response.headers.get("Retry-After"));
  return wait > 0 ? `${words} Try again in ${wait} s.` : words;
}

function sentence(words: string): string {
  const text = words.charAt(0).toUpperCase() + words.slice(1);
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

export async function listModels(): Promise<Model[]> {
  return (await (await call("v1/models")).json()).data;
}

/** The pieces of an answer; the last ones carry how it ended and what it cost. */
export async function* complete(
  body: object,
  signal: AbortSignal,
): AsyncGenerator<Piece> {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_usage: true },
    }),
    signal,
  });
  if (!response.body) throw new Problem("The server sent no answer.");
  const events = response.body
    .pipeThrough(new TextDecoderStream())
    .pipeThrough(new EventSourceParserStream());
  const reader = events.getReader();
  for (;;) {
    const { value, done } = await next(reader, signal);
    if (done) throw new Problem("The answer broke off.");
    if (value.data === "[DONE]") return;
    yield read(value.data);
  }
}

async function next<T>(reader: ReadableStreamDefaultReader<T>, signal: AbortSignal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Problem("The answer broke off: the connection to the server was lost.");
  }
}

function read(data: string): Piece {
  const chunk = JSON.parse(data);
  if (chunk.error) throw new Problem(sentence(String(chunk.error.message)));
  const [choice] = chunk.choices ?? [];
  return {
    text: choice?.delta?.content ?? "",
    finish: choice?.finish_reason ?? null,
    figures: chunk.usage ? figures(chunk.usage, chunk.timings) : null,
  };
}

// biome-ignore lint/suspicious/noExplicitAny: JSON from the server
function figures(usage: any, timings: any): Figures {
  return {
    promptTokens: usage.prompt_tokens ?? null,
    imageTokens: usage.prompt_tokens_details?.image_tokens ?? null,
    cachedTokens: usage.prompt_tokens_details?.cached_tokens ?? null,
    tokens: usage.completion_tokens ?? null,
    firstToken: timings?.ttft_seconds ?? null,
    rate: timings?.tokens_per_second ?? null,
  };
}
