/** The chats of this browser: which one is open, and keeping them. */

import { computed, signal } from "@preact/signals";
import { Conversation } from "./conversation";
import { Answer, type Question } from "./exchange";
import { newId, type Picture } from "./pictures";
import {
  deleteChat,
  type KeptChat,
  type KeptQuestion,
  listChats,
  readChat,
  writeChat,
} from "./storage";

export interface Entry {
  id: string;
  title: string;
  updated: number;
}

// Milliseconds between two writes of a chat that goes on changing.
const PAUSE = 1000;

/** Chats that are open, or changed since the page was. */
const loaded = new Map<string, Conversation>();
const entries = signal<Entry[]>([]);
export const history = computed(() =>
  entries.value.toSorted((one, other) => other.updated - one.updated),
);
export const current = signal<Conversation>(create());
/** Why chats are not kept; empty while they are. */
export const trouble = signal("");

function create(id = newId()): Conversation {
  const conversation = new Conversation(id, (changed, when) => {
    if (when === "now") void keep(changed);
    else keepSoon(changed);
  });
  loaded.set(id, conversation);
  return conversation;
}

// The other tabs of this page.
const tabs = new BroadcastChannel("mm1-chats");

/** Open what the address names, and say what is kept. */
export async function start(): Promise<void> {
  tabs.onmessage = ({ data }) => void followTab(data.id);
  addEventListener("hashchange", () => void openNamed());
  // The last moment that a page is sure to see.
  addEventListener("visibilitychange", () => {
    if (document.visibilityState === "hidden")
      for (const conversation of waiting.keys()) void keep(conversation);
  });
  await refresh();
  await openNamed();
}

async function openNamed(): Promise<void> {
  const id = location.hash.slice(1);
  if (!id) openNew();
  if (!id || id === current.value.id.value) return;
  const conversation = loaded.get(id) ?? (await load(id));
  // A newer address may have come while this one was read.
  if (location.hash.slice(1) !== id) return;
  if (conversation) current.value = conversation;
  else openNew();
}

export function openNew(): void {
  if (!current.value.isEmpty || current.value.busy.value) current.value = create();
  showAddress("");
}

function showAddress(id: string): void {
  const address = id ? `#${id}` : location.pathname + location.search;
  window.history.replaceState(null, "", address);
}

async function load(id: string): Promise<Conversation | null> {
  const found = await attempt(() => readChat(id));
  // It may have been opened meanwhile.
  const opened = loaded.get(id);
  if (opened || !found) return opened ?? null;
  const conversation = create(id);
  fill(conversation, found);
  return conversation;
}

/** Put what was kept into a conversation. */
function fill(
  conversation: Conversation,
  { chat, blobs }: { chat: KeptChat; blobs: Map<string, Blob> },
): void {
  const whole = ({ text, pictures }: KeptQuestion): Question => ({
    text,
    pictures: pictures.map((picture) => ({
      ...picture,
      blob: blobs.get(picture.id) ?? new Blob(),
    })),
  });
  conversation.revision = chat.revision;
  conversation.updated = chat.updated;
  conversation.system.value = chat.system;
  conversation.shots.value = chat.shots.map(({ id, answer, ...question }) => ({
    id,
    answer,
    ...whole(question),
  }));
  conversation.exchanges.value = chat.exchanges.map(({ id, question, answer }) => ({
    id,
    question: whole(question),
    answer: new Answer(answer),
  }));
}

/** Do something with the storage; where it fails say so, and go on without a result. */
async function attempt<T>(act: () => Promise<T>): Promise<T | undefined> {
  try {
    return await act();
  } catch (error) {
    const full = error instanceof DOMException && error.name === "QuotaExceededError";
    trouble.value = full
      ? "The browser's storage is full: chats are kept only until this page is closed. Delete some."
      : "The browser's storage is off: chats are kept only until this page is closed.";
    return undefined;
  }
}

async function refresh(): Promise<void> {
  const kept = await attempt(listChats);
  if (!kept) return;
  const found = new Map<string, Entry>(kept.map((chat) => [chat.id, chat]));
  // What could not be kept is listed all the same.
  for (const conversation of unkept)
    found.set(conversation.id.value, entryOf(conversation));
  entries.value = [...found.values()];
}

function entryOf(conversation: Conversation): Entry {
  const { id, title, updated } = conversation;
  return { id: id.value, title: title.value, updated };
}

/** Conversations that will be kept, and the timers that do it. */
const waiting = new Map<Conversation, number>();
/** Conversations whose last write failed. */
const unkept = new Set<Conversation>();
/** The last write of each conversation: one follows the other. */
const writes = new WeakMap<Conversation, Promise<void>>();

function keepSoon(conversation: Conversation): void {
  if (waiting.has(conversation)) return;
  waiting.set(conversation, window.setTimeout(keep, PAUSE, conversation));
}

function keep(conversation: Conversation): Promise<void> {
  clearTimeout(waiting.get(conversation));
  waiting.delete(conversation);
  const before = writes.get(conversation) ?? Promise.resolve();
  const write = before.then(() => keepNow(conversation));
  writes.set(conversation, write);
  return write;
}

async function keepNow(conversation: Conversation): Promise<void> {
  const id = conversation.id.value;
  // Deleted while it waited.
  if (loaded.get(id) !== conversation) return;
  if (conversation.isEmpty && !conversation.revision) return;
  const [chat, pictures] = packed(conversation);
  const kept = await attempt(() => writeChat(chat, pictures));
  if (loaded.get(id) !== conversation) return;
  if (kept === undefined) unkept.add(conversation);
  else {
    unkept.delete(conversation);
    if (!unkept.size) trouble.value = "";
    conversation.revision = kept === id ? chat.revision + 1 : 1;
    if (kept !== id) rename(conversation, kept);
    tabs.postMessage({ id: kept });
  }
  if (conversation === current.value) showAddress(conversation.id.value);
  entries.value = [
    ...entries.value.filter((entry) => entry.id !== conversation.id.value),
    entryOf(conversation),
  ];
}

function rename(conversation: Conversation, id: string): void {
  loaded.delete(conversation.id.value);
  loaded.set(id, conversation);
  conversation.id.value = id;
  conversation.notice.value =
    "This chat was changed in another tab too. What was written here is now a chat of its own.";
}

function packed(conversation: Conversation): [KeptChat, Picture[]] {
  const pictures: Picture[] = [];
  const pack = (question: Question) => {
    pictures.push(...question.pictures);
    const named = question.pictures.map(({ id, name, type }) => ({ id, name, type }));
    return { text: question.text, pictures: named };
  };
  const chat: KeptChat = {
    ...entryOf(conversation),
    revision: conversation.revision,
    system: conversation.system.value,
    shots: conversation.shots.value.map((shot) => ({
      id: shot.id,
      answer: shot.answer,
      ...pack(shot),
    })),
    exchanges: conversation.exchanges.value.map(({ id, question, answer }) => ({
      id,
      question: pack(question),
      answer: answer.kept(),
    })),
  };
  return [chat, pictures];
}

/** Delete a chat here and in the other tabs. */
export async function remove(id: string): Promise<void> {
  forget(id);
  await attempt(() => deleteChat(id));
  tabs.postMessage({ id });
  // There may be room now.
  for (const conversation of unkept) void keep(conversation);
}

function forget(id: string): void {
  const conversation = loaded.get(id);
  loaded.delete(id);
  if (conversation) unkept.delete(conversation);
  conversation?.stop();
  entries.value = entries.value.filter((entry) => entry.id !== id);
  if (conversation === current.value) {
    current.value = create();
    showAddress("");
  }
}

/** Another tab wrote or deleted a chat: show what it is now, unless it changed here too. */
async function followTab(id: string): Promise<void> {
  await refresh();
  const conversation = loaded.get(id);
  // What was never kept cannot have been deleted.
  if (!conversation?.revision) return;
  await writes.get(conversation);
  const found = await attempt(() => readChat(id));
  const changed =
    conversation.busy.value || waiting.has(conversation) || unkept.has(conversation);
  // Its own write may have made it a chat of its own meanwhile.
  if (changed || found === undefined || loaded.get(id) !== conversation) return;
  if (found === null) forget(id);
  else if (found.chat.revision !== conversation.revision) fill(conversation, found);
}
