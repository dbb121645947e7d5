/** How to answer, and how the page looks: kept for every chat of this browser. */

import { effect, signal } from "@preact/signals";

export const DETAILS = ["auto", "low", "high"] as const;
export type Detail = (typeof DETAILS)[number];
export const THEMES = ["auto", "light", "dark"] as const;
export type Theme = (typeof THEMES)[number];

export interface Settings {
  /** The resolution mode of a question's pictures. */
  detail: Detail;
  /** The resolution mode of the examples' pictures. */
  exampleDetail: Detail;
  temperature: number;
  topP: number;
  /** null: a new one for every answer. */
  seed: number | null;
  /** Tokens. */
  maxTokens: number;
  /** An answer ends before the first of these. */
  stop: string[];
}

export const DEFAULTS: Settings = {
  detail: "auto",
  exampleDetail: "auto",
  temperature: 0,
  topP: 1,
  seed: null,
  maxTokens: 512,
  stop: [],
};

const SETTINGS = "mm1-settings";
const THEME = "mm1-theme";

function read(name: string): unknown {
  try {
    return JSON.parse(localStorage.getItem(name) ?? "null");
  } catch {
    return null; // Storage is off, or somebody else wrote there.
  }
}

function write(name: string, value: unknown): void {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    // Kept until the page is left.
  }
}

/** The defaults, with what was kept and is of the same type. */
function checked(kept: unknown): Settings {
  const found: Record<string, unknown> = { ...DEFAULTS };
  const given = Object(kept) as Record<string, unknown>;
  for (const name of ["temperature", "topP", "maxTokens", "seed"])
    if (typeof given[name] === "number") found[name] = given[name];
  for (const name of ["detail", "exampleDetail"])
    if (DETAILS.includes(given[name] as Detail)) found[name] = given[name];
  if (Array.isArray(given.stop))
    found.stop = given.stop.filter((text) => typeof text === "string" && text);
  return found as unknown as Settings;
}

export const settings = signal<Settings>(checked(read(SETTINGS)));
const kept = read(THEME) as Theme;
export const theme = signal<Theme>(THEMES.includes(kept) ? kept : "auto");

export function change(part: Partial<Settings>): void {
  settings.value = { ...settings.value, ...part };
}

effect(() => write(SETTINGS, settings.value));
effect(() => {
  write(THEME, theme.value);
  document.documentElement.dataset.theme = theme.value;
});
