/** Solved examples, which the model is shown before the first question. */

import { Plus, Trash2 } from "lucide";
import type { Conversation } from "../conversation";
import { isSolved, type Shot } from "../exchange";
import { newId } from "../pictures";
import { change, settings } from "../settings";
import { DetailChoice } from "./detail";
import { Dialog } from "./dialog";
import { Icon, IconButton } from "./icon";
import { AddPictures, PictureTarget, RemovablePictures } from "./pictures";

export function ExamplesDialog({
  conversation,
  onClose,
}: {
  conversation: Conversation;
  onClose(): void;
}) {
  const shots = conversation.shots.value;
  const add = () =>
    conversation.setShots([
      ...shots,
      // Most examples ask the same.
      { id: newId(), text: shots.at(-1)?.text ?? "", pictures: [], answer: "" },
    ]);
  return (
    <Dialog title="Examples" onClose={onClose}>
      <p>
        Solved examples show the model what to do. They stand before the first question
        of this chat.
      </p>
      <ol class="shots">
        {shots.map((shot, index) => (
          <li key={shot.id}>
            <ShotFields
              shot={shot}
              number={index + 1}
              onChange={(changed) =>
                conversation.setShots(
                  shots.map((other) => (other.id === shot.id ? changed : other)),
                )
              }
              onRemove={() =>
                conversation.setShots(shots.filter(({ id }) => id !== shot.id))
              }
            />
          </li>
        ))}
      </ol>
      <div class="bar">
        <button type="button" onClick={add}>
          <Icon of={Plus} />
          Add an example
        </button>
        <DetailChoice
          value={settings.value.exampleDetail}
          onChange={(exampleDetail) => change({ exampleDetail })}
        />
      </div>
    </Dialog>
  );
}

function ShotFields({
  shot,
  number,
  onChange,
  onRemove,
}: {
  shot: Shot;
  number: number;
  onChange(shot: Shot): void;
  onRemove(): void;
}) {
  const setPictures = (pictures: Shot["pictures"]) => onChange({ ...shot, pictures });
  return (
    <fieldset>
      <legend>Example {number}</legend>
      <PictureTarget pictures={shot.pictures} onChange={setPictures}>
        <RemovablePictures pictures={shot.pictures} onChange={setPictures} />
        <label>
          Question
          <input
            value={shot.text}
            onInput={({ currentTarget }) =>
              onChange({ ...shot, text: currentTarget.value })
            }
          />
        </label>
        <label>
          Answer
          <input
            value={shot.answer}
            onInput={({ currentTarget }) =>
              onChange({ ...shot, answer: currentTarget.value })
            }
          />
        </label>
        {!isSolved(shot) && (
          <p class="note">
            Without {shot.answer.trim() ? "a picture or a question" : "an answer"} it is
            not shown to the model.
          </p>
        )}
        <div class="bar">
          <AddPictures pictures={shot.pictures} onChange={setPictures} />
          <IconButton
            icon={Trash2}
            label={`Remove example ${number}`}
            onClick={onRemove}
          />
        </div>
      </PictureTarget>
    </fieldset>
  );
}
