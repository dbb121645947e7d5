/** Where a question is written, with its pictures. */

import { ArrowUp, Square } from "lucide";
import type { TargetedKeyboardEvent } from "preact";
import type { Conversation } from "../conversation";
import { change, settings } from "../settings";
import { DetailChoice } from "./detail";
import { Icon } from "./icon";
import { AddPictures, RemovablePictures } from "./pictures";

export function Composer({ conversation }: { conversation: Conversation }) {
  const { text, pictures } = conversation.draft.value;
  const write = (part: object) => {
    conversation.draft.value = { ...conversation.draft.value, ...part };
  };
  const isEmpty = !text.trim() && !pictures.length;
  const ask = () => {
    if (isEmpty || conversation.busy.value) return;
    void conversation.ask(conversation.draft.value);
    conversation.draft.value = { text: "", pictures: [] };
  };
  const onKeyDown = (event: TargetedKeyboardEvent<HTMLElement>) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouch())
      return;
    event.preventDefault();
    ask();
  };
  return (
    <form
      class="composer"
      onSubmit={(event) => {
        event.preventDefault();
        ask();
      }}
    >
      <RemovablePictures
        pictures={pictures}
        onChange={(pictures) => write({ pictures })}
      />
      <textarea
        id="question"
        aria-label="Question"
        placeholder="Ask, and drop or paste pictures here"
        rows={1}
        value={text}
        onInput={({ currentTarget }) => write({ text: currentTarget.value })}
        onKeyDown={onKeyDown}
      />
      <div class="bar">
        <AddPictures pictures={pictures} onChange={(pictures) => write({ pictures })} />
        <DetailChoice
          value={settings.value.detail}
          onChange={(detail) => change({ detail })}
        />
        {conversation.busy.value ? (
          <button type="button" class="main" onClick={() => conversation.stop()}>
            <Icon of={Square} solid />
            Stop
          </button>
        ) : (
          <button type="submit" class="main" disabled={isEmpty}>
            <Icon of={ArrowUp} />
            Ask
          </button>
        )}
      </div>
    </form>
  );
}

/** On a phone's keyboard Enter begins a line. */
function isTouch(): boolean {
  return matchMedia("(hover: none) and (pointer: coarse)").matches;
}
