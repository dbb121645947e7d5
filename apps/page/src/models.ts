/** The model that is asked. */

import { signal } from "@preact/signals";
import { listModels } from "./api";

/** Its name; empty until the server told it. */
export const model = signal("");
/** Why the server did not tell; empty where it did. */
export const unreachable = signal("");

/** Ask the server for its models, and take the first. */
export async function findModel(): Promise<void> {
  unreachable.value = "";
  try {
    model.value = (await listModels())[0] ?? "";
  } catch (error) {
    unreachable.value = error instanceof Error ? error.message : String(error);
  }
}
