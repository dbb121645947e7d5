/** A chat -> the body of a request to /v1/chat/completions. */

import type { Conversation } from "./conversation";
import { isShown, isSolved, type Question } from "./exchange";
import { model } from "./models";
import { dataUri } from "./pictures";
import { type Detail, settings } from "./settings";

type Part =
  | { type: "text"; text: string }
  | { type: "image_url"; image_url: { url: string; detail: Detail } };
interface Message {
  role: "system" | "user" | "assistant";
  content: string | Part[];
}

/** The request for the chat's last answer. */
export async function request(conversation: Conversation): Promise<object> {
  const { detail, exampleDetail, temperature, topP, seed, maxTokens, stop } =
    settings.value;
  const messages: Message[] = [];
  const system = conversation.system.value.trim();
  if (system) messages.push({ role: "system", content: system });
  for (const shot of conversation.shots.value.filter(isSolved))
    messages.push(await asked(shot, exampleDetail), answered(shot.answer));
  const exchanges = conversation.exchanges.value;
  for (const exchange of exchanges.slice(0, -1).filter(isShown))
    messages.push(
      await asked(exchange.question, detail),
      answered(exchange.answer.text.value),
    );
  const last = exchanges.at(-1);
  if (last) messages.push(await asked(last.question, detail));
  return {
    model: model.value?.id ?? "",
    messages,
    temperature,
    top_p: topP,
    max_tokens: maxTokens,
    ...(seed === null ? {} : { seed }),
    ...(stop.length ? { stop } : {}),
  };
}

/** A question: its pictures, then its text. */
async function asked(question: Question, detail: Detail): Promise<Message> {
  const pictures = await Promise.all(
    question.pictures.map(async (picture): Promise<Part> => {
      return { type: "image_url", image_url: { url: await dataUri(picture), detail } };
    }),
  );
  const text = question.text.trim();
  const parts = text ? [...pictures, { type: "text" as const, text }] : pictures;
  return { role: "user", content: parts };
}

function answered(content: string): Message {
  return { role: "assistant", content };
}
