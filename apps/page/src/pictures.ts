/** Files, drops and pastes -> pictures, and pictures -> data URIs. */

import { Problem } from "./api";

export interface Picture {
  id: string;
  name: string;
  /** A media type, image/... */
  type: string;
  /** The file as it came: the server decodes, turns and resizes it. */
  blob: Blob;
}

// What browsers give no media type for, or not all of them.
const SUFFIXES: Record<string, string> = {
  avif: "image/avif",
  heic: "image/heic",
  heif: "image/heif",
};
export const ACCEPT = `image/*,${Object.keys(SUFFIXES).map((suffix) => `.${suffix}`)}`;

/** A name that no other thing of this page has. */
export function newId(): string {
  // crypto.randomUUID is missing where the page comes over plain http from afar.
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function typeOf(file: File): string | undefined {
  if (file.type.startsWith("image/")) return file.type;
  return SUFFIXES[file.name.split(".").pop()?.toLowerCase() ?? ""];
}

/** The pictures among some files, and the names of the others. */
export function sort(files: Iterable<File>): { pictures: Picture[]; others: string[] } {
  const pictures: Picture[] = [];
  const others: string[] = [];
  for (const file of files) {
    const type = typeOf(file);
    if (type) pictures.push({ id: newId(), name: file.name, type, blob: file });
    else others.push(file.name);
  }
  return { pictures, others };
}

/** The picture's bytes, as the API takes them. */
export function dataUri({ blob, type, name }: Picture): Promise<string> {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => {
      const uri = reader.result as string;
      resolve(`data:${type};base64,${uri.slice(uri.indexOf(",") + 1)}`);
    };
    reader.onerror = () =>
      reject(new Problem(`${name} can no longer be read. Add it again.`));
    reader.readAsDataURL(blob);
  });
}
