/** A question with its pictures, and its answer. */

import { computed, signal } from "@preact/signals";
import type { Figures } from "./api";
import type { Picture } from "./pictures";

export interface Question {
  text: string;
  pictures: Picture[];
}

/** A solved example, shown to the model as an earlier turn. */
export interface Shot extends Question {
  id: string;
  answer: string;
}

/** Whether the model is shown it: something is asked, and answered. */
export function isSolved({ text, pictures, answer }: Shot): boolean {
  return Boolean(answer.trim() && (text.trim() || pictures.length));
}

/**
 * asked: nothing of it is here yet; cut: the longest answer that was allowed;
 * stopped: by a person, or by leaving the page; failed: `problem` says why.
 */
export type State = "asked" | "writing" | "done" | "cut" | "stopped" | "failed";

/** An answer as it is kept. */
export interface KeptAnswer {
  text: string;
  state: State;
  /** Why it failed. */
  problem: string;
  figures: Figures | null;
}

function isRunning(state: State): boolean {
  return state === "asked" || state === "writing";
}

// Milliseconds: each time an answer is rendered whole, and more often nobody sees.
const FRAME = 40;

export class Answer {
  readonly text = signal("");
  readonly state = signal<State>("asked");
  readonly problem = signal("");
  readonly figures = signal<Figures | null>(null);
  readonly running = computed(() => isRunning(this.state.value));

  private coming = "";
  private timer = 0;

  /** A new one, or one that was kept. */
  constructor(kept?: KeptAnswer) {
    if (!kept) return;
    this.text.value = kept.text;
    this.problem.value = kept.problem;
    this.figures.value = kept.figures;
    // The page was left while it came.
    this.state.value = isRunning(kept.state) ? "stopped" : kept.state;
  }

  /** Write more of it, which is seen a moment later. */
  add(piece: string): void {
    this.coming += piece;
    if (this.state.value === "asked") this.show();
    else this.timer ||= window.setTimeout(() => this.show(), FRAME);
  }

  /** Let all that was written be seen. */
  show(): void {
    clearTimeout(this.timer);
    this.timer = 0;
    const before = this.text.value;
    // Many tokenizers begin an answer with a space.
    this.text.value = before ? before + this.coming : this.coming.trimStart();
    this.coming = "";
    if (this.text.value && this.state.value === "asked") this.state.value = "writing";
  }

  kept(): KeptAnswer {
    const { text, state, problem, figures } = this;
    return {
      text: text.value,
      state: state.value,
      problem: problem.value,
      figures: figures.value,
    };
  }
}

export interface Exchange {
  id: string;
  question: Question;
  answer: Answer;
}

/** Whether an exchange is part of what the model is shown before the next question. */
export function isShown({ answer }: Exchange): boolean {
  return answer.text.value.trim() !== "";
}
