/** Asks for the server's API key. */

import { useState } from "preact/hooks";
import { keyWanted } from "../api";
import { Dialog } from "./dialog";

export function KeyDialog() {
  const [key, setKey] = useState("");
  const wanted = keyWanted.value;
  if (!wanted) return null;
  return (
    <Dialog title="API key" kind="small" onClose={() => wanted.give(null)}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          setKey("");
          wanted.give(key.trim());
        }}
      >
        {wanted.wrong && (
          <p class="problem" role="alert">
            The server does not know this key.
          </p>
        )}
        <label>
          The key that mm1 serve was started with
          <input
            type="password"
            required
            autofocus
            autocomplete="off"
            value={key}
            onInput={({ currentTarget }) => setKey(currentTarget.value)}
          />
          <small>It is kept until this tab is closed.</small>
        </label>
        <div class="bar">
          <button type="submit" class="main">
            Use the key
          </button>
        </div>
      </form>
    </Dialog>
  );
}
