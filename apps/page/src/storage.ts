/**
 * Chats and their pictures in the browser's IndexedDB.
 *
 * A chat counts how often it was written. Who writes it names the count that they know:
 * where it is another one, another tab wrote meanwhile, and theirs becomes a chat of its own.
 */

import { type DBSchema, type IDBPDatabase, openDB } from "idb";
import type { KeptAnswer } from "./exchange";
import { newId, type Picture } from "./pictures";

export interface KeptQuestion {
  text: string;
  /** Their blobs are in a store of their own: they do not change. */
  pictures: Omit<Picture, "blob">[];
}

export interface KeptChat {
  id: string;
  revision: number;
  title: string;
  updated: number;
  system: string;
  shots: (KeptQuestion & { id: string; answer: string })[];
  exchanges: {
    id: string;
    question: KeptQuestion;
    answer: KeptAnswer;
  }[];
}

interface Schema extends DBSchema {
  chats: { key: string; value: KeptChat };
  pictures: { key: [string, string]; value: { chat: string; id: string; blob: Blob } };
}

let opened: Promise<IDBPDatabase<Schema>> | null = null;

function database(): Promise<IDBPDatabase<Schema>> {
  opened ??= openDB<Schema>("mm1", 1, {
    upgrade(db) {
      db.createObjectStore("chats", { keyPath: "id" });
      db.createObjectStore("pictures", { keyPath: ["chat", "id"] });
    },
    blocking(_, __, event) {
      // A newer page wants to change the stores.
      (event.target as IDBDatabase).close();
      opened = null;
    },
    terminated() {
      opened = null;
    },
  });
  opened.catch(() => {
    opened = null;
  });
  return opened;
}

/** Every key of a chat's pictures: arrays sort behind what is in them. */
function picturesOf(chat: string): IDBKeyRange {
  return IDBKeyRange.bound([chat], [chat, []]);
}

export async function listChats(): Promise<KeptChat[]> {
  return (await database()).getAll("chats");
}

export async function readChat(
  id: string,
): Promise<{ chat: KeptChat; blobs: Map<string, Blob> } | null> {
  const read = (await database()).transaction(["chats", "pictures"]);
  const [chat, pictures] = await Promise.all([
    read.objectStore("chats").get(id),
    read.objectStore("pictures").getAll(picturesOf(id)),
  ]);
  if (!chat) return null;
  return { chat, blobs: new Map(pictures.map(({ id, blob }) => [id, blob])) };
}

/**
 * Write a chat whole or not at all, and say under which name.
 *
 * `chat.revision` is what its writer knows, 0 for a new one.
 */
export async function writeChat(chat: KeptChat, pictures: Picture[]): Promise<string> {
  const write = (await database()).transaction(["chats", "pictures"], "readwrite");
  const chats = write.objectStore("chats");
  const store = write.objectStore("pictures");
  const known = await chats.get(chat.id);
  const id = (known?.revision ?? 0) === chat.revision ? chat.id : newId();
  const keys = await store.getAllKeys(picturesOf(id));
  const kept = new Set(keys.map(([, picture]) => picture));
  const wanted = new Set(pictures.map((picture) => picture.id));
  await Promise.all([
    chats.put({ ...chat, id, revision: id === chat.id ? chat.revision + 1 : 1 }),
    ...pictures
      .filter((picture) => !kept.has(picture.id))
      .map((picture) => store.put({ chat: id, id: picture.id, blob: picture.blob })),
    ...keys
      .filter(([, picture]) => !wanted.has(picture))
      .map((key) => store.delete(key)),
    write.done,
  ]);
  return id;
}

export async function deleteChat(id: string): Promise<void> {
  const write = (await database()).transaction(["chats", "pictures"], "readwrite");
  await Promise.all([
    write.objectStore("chats").delete(id),
    write.objectStore("pictures").delete(picturesOf(id)),
    write.done,
  ]);
}
