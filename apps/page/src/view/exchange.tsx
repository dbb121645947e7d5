/** A question, and its answer. */

import { Pencil } from "lucide";
import { useState } from "preact/hooks";
import type { Conversation } from "../conversation";
import { type Exchange, isShown, type Question } from "../exchange";
import type { Picture } from "../pictures";
import { AnswerView } from "./answer";
import { IconButton } from "./icon";
import { AddPictures, PictureTarget, RemovablePictures, Thumbnails } from "./pictures";

export function ExchangeView({
  conversation,
  exchange,
}: {
  conversation: Conversation;
  exchange: Exchange;
}) {
  const [editing, setEditing] = useState(false);
  const { question, answer } = exchange;
  const exchanges = conversation.exchanges.value;
  const last = exchanges.at(-1) === exchange;
  return (
    <article class="exchange">
      <div class="question">
        <h2 class="unseen-text">Question</h2>
        {editing ? (
          <Edit
            question={question}
            onCancel={() => setEditing(false)}
            onSend={(changed) => void conversation.edit(exchange.id, changed)}
          />
        ) : (
          <>
            <IconButton
              icon={Pencil}
              label="Edit the question"
              onClick={() => setEditing(true)}
            />
            <div class="said">
              <Thumbnails pictures={question.pictures} />
              {question.text && <p>{question.text}</p>}
            </div>
          </>
        )}
      </div>
      <AnswerView
        answer={answer}
        pictures={latestPictures(exchanges, exchange)}
        onRetry={last ? () => void conversation.retry() : undefined}
      />
      {!last && !isShown(exchange) && (
        <p class="note">The model is not shown this question: it has no answer.</p>
      )}
    </article>
  );
}

/** The pictures of the last question up to one that has any. */
function latestPictures(exchanges: Exchange[], upTo: Exchange): Picture[] {
  const before = exchanges.slice(0, exchanges.indexOf(upTo) + 1);
  return (
    before.findLast(({ question }) => question.pictures.length)?.question.pictures ?? []
  );
}

function Edit({
  question,
  onCancel,
  onSend,
}: {
  question: Question;
  onCancel(): void;
  onSend(question: Question): void;
}) {
  const [text, setText] = useState(question.text);
  const [pictures, setPictures] = useState(question.pictures);
  return (
    <form
      class="edit"
      onSubmit={(event) => {
        event.preventDefault();
        if (text.trim() || pictures.length) onSend({ text, pictures });
      }}
      onKeyDown={(event) => {
        if (event.key !== "Escape") return;
        event.stopPropagation();
        onCancel();
      }}
    >
      <PictureTarget pictures={pictures} onChange={setPictures}>
        <RemovablePictures pictures={pictures} onChange={setPictures} />
        <textarea
          aria-label="The question, changed"
          value={text}
          rows={3}
          ref={focus}
          onInput={({ currentTarget }) => setText(currentTarget.value)}
        />
      </PictureTarget>
      <p class="note">What follows the question is replaced.</p>
      <div class="bar">
        <AddPictures pictures={pictures} onChange={setPictures} />
        <button type="button" onClick={onCancel}>
          Cancel
        </button>
        <button type="submit" class="main">
          Ask again
        </button>
      </div>
    </form>
  );
}

function focus(element: HTMLElement | null): void {
  element?.focus();
}
