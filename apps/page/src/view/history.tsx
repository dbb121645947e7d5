/** The chats of this browser. */

import { Plus, Trash2 } from "lucide";
import { useRef, useState } from "preact/hooks";
import { current, type Entry, history, openNew, remove, trouble } from "../chats";
import { Dialog } from "./dialog";
import { Icon, IconButton } from "./icon";

/** `onOpen` is called when a chat was chosen. */
export function History({ onOpen }: { onOpen?: () => void }) {
  const [doomed, setDoomed] = useState<Entry | null>(null);
  const fresh = useRef<HTMLButtonElement>(null);
  return (
    <nav class="history" aria-label="Chats">
      <button
        ref={fresh}
        type="button"
        onClick={() => {
          openNew();
          onOpen?.();
          // Behind a dialog's closing, which gives the focus back.
          setTimeout(() => document.getElementById("question")?.focus());
        }}
      >
        <Icon of={Plus} />
        New chat
      </button>
      {trouble.value && (
        <p class="problem" role="status">
          {trouble.value}
        </p>
      )}
      <ul>
        {history.value.map((entry) => (
          <li key={entry.id}>
            <a
              href={`#${entry.id}`}
              aria-current={entry.id === current.value.id.value ? "page" : undefined}
              onClick={onOpen}
            >
              {entry.title}
            </a>
            <IconButton
              icon={Trash2}
              label={`Delete ${entry.title}`}
              onClick={() => setDoomed(entry)}
            />
          </li>
        ))}
      </ul>
      {doomed && (
        <Dialog title="Delete this chat?" kind="small" onClose={() => setDoomed(null)}>
          <p>“{doomed.title}” and its pictures are removed from this browser.</p>
          <div class="bar">
            <button type="button" onClick={() => setDoomed(null)}>
              Keep
            </button>
            <button
              type="button"
              class="main danger"
              onClick={() => {
                void remove(doomed.id);
                setDoomed(null);
                // Its own button is gone.
                fresh.current?.focus();
              }}
            >
              Delete
            </button>
          </div>
        </Dialog>
      )}
    </nav>
  );
}
