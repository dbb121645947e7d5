/** A modal dialog: the browser's own, which keeps the focus and gives it back. */

import { X } from "lucide";
import type { ComponentChildren } from "preact";
import { useId, useLayoutEffect, useRef } from "preact/hooks";
import { IconButton } from "./icon";

export function Dialog({
  title,
  kind = "",
  onClose,
  children,
}: {
  title: string;
  kind?: string;
  onClose(): void;
  children: ComponentChildren;
}) {
  const ref = useRef<HTMLDialogElement>(null);
  const name = useId();
  // At once: a key that is pressed next is the dialog's.
  useLayoutEffect(() => {
    const dialog = ref.current;
    dialog?.showModal();
    // Closing gives the focus back; going away does not.
    return () => dialog?.close();
  }, []);
  return (
    // biome-ignore lint/a11y/useKeyWithClickEvents: Escape closes a modal dialog
    <dialog
      ref={ref}
      class={kind}
      aria-labelledby={name}
      onClose={onClose}
      // The dialog itself is under the pointer only beside its content.
      onClick={(event) => event.target === ref.current && ref.current?.close()}
    >
      <div class="sheet">
        <header>
          <h2 id={name}>{title}</h2>
          <IconButton icon={X} label="Close" onClick={() => ref.current?.close()} />
        </header>
        {children}
      </div>
    </dialog>
  );
}
