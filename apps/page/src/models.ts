/** The model that is asked, and what it can do. */

import { signal } from "@preact/signals";
import { listModels } from "./api";
import type { Detail } from "./settings";

export interface Model {
  id: string;
  /** Not of OpenAI's: another server leaves it out. */
  mm1?: {
    answers: boolean;
    /** The names of the modes, such as 2x672; null where it takes no pictures. */
    resolution: Record<Detail, string> | null;
  };
}

/** null until the server told it. */
export const model = signal<Model | null>(null);
/** Why the server did not tell; empty where it did. */
export const unreachable = signal("");

/** Ask the server for its models, and take the first. */
export async function findModel(): Promise<void> {
  unreachable.value = "";
  try {
    model.value = (await listModels())[0] ?? null;
  } catch (error) {
    unreachable.value = error instanceof Error ? error.message : String(error);
  }
}

/** What the model cannot do, in words; empty where it can do everything. */
export function lack({ mm1 }: Model): string {
  if (mm1?.answers === false) return "This model answers no questions.";
  return mm1?.resolution === null ? "This model takes no pictures." : "";
}
