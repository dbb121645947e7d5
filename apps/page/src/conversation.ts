/** A chat: its examples, its questions and answers, and the answer under way. */

import { computed, type Signal, signal } from "@preact/signals";
import { complete, type Figures, Problem } from "./api";
import { Answer, type Exchange, type Question, type Shot } from "./exchange";
import { newId } from "./pictures";
import { request } from "./request";

const TITLE = 60;

export class Conversation {
  /** Names the chat where it is kept. */
  readonly id: Signal<string>;
  /** How often it was kept; what is kept must not be newer. */
  revision = 0;
  /** Milliseconds since 1970, of the last question or answer. */
  updated = Date.now();
  readonly system = signal("");
  readonly shots = signal<Shot[]>([]);
  readonly exchanges = signal<Exchange[]>([]);
  /** What is typed and not asked yet; it is not kept. */
  readonly draft = signal<Question>({ text: "", pictures: [] });
  /** What happened to the chat itself. */
  readonly notice = signal("");
  /** The last answer that was asked for since the page was opened. */
  spoken: Answer | null = null;
  private readonly answering = signal<AbortController | null>(null);
  readonly busy = computed(() => this.answering.value !== null);
  readonly title = computed(() => {
    const [first] = this.exchanges.value;
    const text = first?.question.text ?? this.shots.value[0]?.text ?? "";
    const line = text.trim().replace(/\s+/g, " ");
    if (!line) return first?.question.pictures.length ? "Picture" : "New chat";
    return line.length > TITLE ? `${line.slice(0, TITLE - 1)}…` : line;
  });

  /** `changed` is called when there is something to keep; later will do while it grows. */
  constructor(
    id: string,
    private readonly changed: (
      conversation: Conversation,
      when: "now" | "soon",
    ) => void,
  ) {
    this.id = signal(id);
  }

  get isEmpty(): boolean {
    return (
      !this.exchanges.value.length && !this.shots.value.length && !this.system.value
    );
  }

  /** Ask a question behind the others. */
  ask(question: Question): Promise<void> {
    return this.askAt(this.exchanges.value.length, question);
  }

  /** Ask the last question again. */
  retry(): Promise<void> {
    const last = this.exchanges.value.length - 1;
    const exchange = this.exchanges.value[last];
    return exchange ? this.askAt(last, exchange.question) : Promise.resolve();
  }

  /** Put another question in the place of one; what follows it goes. */
  edit(id: string, question: Question): Promise<void> {
    const index = this.exchanges.value.findIndex((exchange) => exchange.id === id);
    return index < 0 ? Promise.resolve() : this.askAt(index, question);
  }

  stop(): void {
    this.answering.value?.abort();
  }

  setSystem(text: string): void {
    this.system.value = text;
    this.changed(this, "soon");
  }

  setShots(shots: Shot[]): void {
    this.shots.value = shots;
    this.changed(this, "soon");
  }

  private async askAt(index: number, question: Question): Promise<void> {
    this.stop();
    const controller = new AbortController();
    const exchange = { id: newId(), question, answer: new Answer() };
    this.spoken = exchange.answer;
    this.exchanges.value = [...this.exchanges.value.slice(0, index), exchange];
    this.answering.value = controller;
    this.touch();
    try {
      await this.write(exchange.answer, controller.signal);
    } finally {
      if (this.answering.value === controller) this.answering.value = null;
      this.touch();
    }
  }

  private async write(answer: Answer, stopped: AbortSignal): Promise<void> {
    const asked = performance.now();
    let firstToken: number | null = null;
    let finish: string | null = null;
    try {
      const body = await request(this);
      stopped.throwIfAborted();
      for await (const piece of complete(body, stopped)) {
        if (piece.text) {
          firstToken ??= (performance.now() - asked) / 1000;
          answer.add(piece.text);
          this.changed(this, "soon");
        }
        finish = piece.finish ?? finish;
        if (piece.figures) answer.figures.value = withClock(piece.figures, firstToken);
      }
      answer.show();
      answer.state.value = finish === "length" ? "cut" : "done";
    } catch (error) {
      answer.show();
      if (stopped.aborted) {
        answer.state.value = "stopped";
        return;
      }
      answer.problem.value = error instanceof Error ? error.message : String(error);
      answer.state.value = "failed";
      // Anything else is a bug of ours, and belongs on the console too.
      if (!(error instanceof Problem)) console.error(error);
    }
  }

  private touch(): void {
    this.updated = Date.now();
    this.changed(this, "now");
  }
}

/** The figures, with the page's own clock where the server tells no time. */
function withClock(figures: Figures, firstToken: number | null): Figures {
  return { ...figures, firstToken: figures.firstToken ?? firstToken };
}
