/** An answer -> what a screen reader is given of it. */

import type { State } from "./exchange";

const SENTENCE = /[^\n.!?]*(?:[.!?]+(?=\s)|\n+)/g;
// Written around words to set them off.
const MARKS = /[*_`#>|]+/g;

/** The sentences and lines that are complete; with `whole`, what is left too. */
export function sentences(text: string, whole: boolean): string[] {
  const found: string[] = [];
  let end = 0;
  for (const match of text.matchAll(SENTENCE)) {
    found.push(match[0]);
    end = match.index + match[0].length;
  }
  if (whole) found.push(text.slice(end));
  return found.map((part) => part.replace(MARKS, "").trim()).filter(Boolean);
}

/** How an answer ended, in words. */
export function ended(state: State): string {
  if (state === "stopped") return "Stopped.";
  return state === "failed" ? "" : "End of the answer.";
}
