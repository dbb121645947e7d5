/**
 * Boxes that an answer names -> pixels, exactly as mm1_mlx/grounding.py reads them:
 * "a dog [156, 104, 468, 416]", in 0..1000 of the picture's width and height.
 */

export interface Box {
  label: string;
  /** Left, top, right and bottom in pixels of the upright picture. */
  box: [number, number, number, number];
}

const NUMBER = String.raw`\s*(-?\d{1,6})\s*`;
const BOX = new RegExp(String.raw`\[${Array(4).fill(NUMBER).join(",")}\]`, "g");
const JOINS = new Set(["and", "or", ""]);
const BETWEEN = /[\s,;&]+/;
const LEADING_JOINS = /^(?:(?:and|or)(?:[\s,;&]+|$))+/;
// What separates phrases: the end of a sentence or a line.
const ENDS = /[.!?;:](?:\s|$)|\n/;
const MOST = 1000;

/** The boxes in a picture of this size, in the text's order. */
export function parseBoxes(text: string, width: number, height: number): Box[] {
  const boxes: Box[] = [];
  let label = "";
  let end = 0;
  for (const match of text.matchAll(BOX)) {
    const between = text.slice(end, match.index);
    const joined = between.split(BETWEEN).every((word) => JOINS.has(word));
    if (!(end && joined)) label = phrase(between);
    end = match.index + match[0].length;
    const box = inPixels(match.slice(1).map(Number), width, height);
    if (box) boxes.push({ label, box });
  }
  return boxes;
}

export function namesBoxes(text: string): boolean {
  return text.search(BOX) >= 0;
}

/** The last phrase of a text, without what joins it to the one before. */
function phrase(text: string): string {
  const last = trim(
    trimEnd(text.trimEnd(), ".!?;:,").split(ENDS).at(-1) ?? "",
    " ,.;&-*",
  );
  return last.replace(LEADING_JOINS, "").trim();
}

function trimEnd(text: string, characters: string): string {
  let end = text.length;
  while (end > 0 && characters.includes(text.charAt(end - 1))) end--;
  return text.slice(0, end);
}

function trim(text: string, characters: string): string {
  let start = 0;
  while (start < text.length && characters.includes(text.charAt(start))) start++;
  return trimEnd(text.slice(start), characters);
}

function inPixels(numbers: number[], width: number, height: number): Box["box"] | null {
  const [x1 = 0, y1 = 0, x2 = 0, y2 = 0] = numbers;
  const reversed = x2 < x1 || y2 < y1;
  if (reversed || x2 < 0 || y2 < 0 || x1 > MOST || y1 > MOST) return null;
  const pixel = (value: number, side: number) =>
    // In this order: another one rounds otherwise.
    Math.trunc(Math.min(Math.max(value, 0), MOST) * (side / MOST));
  return [pixel(x1, width), pixel(y1, height), pixel(x2, width), pixel(y2, height)];
}
