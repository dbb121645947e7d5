/** How to answer: sampling, lengths, and the chat's system message. */

import type { TargetedInputEvent } from "preact";
import type { Conversation } from "../conversation";
import { change, DEFAULTS, type Settings, settings } from "../settings";
import { Dialog } from "./dialog";

export function SettingsDialog({
  conversation,
  onClose,
}: {
  conversation: Conversation;
  onClose(): void;
}) {
  const { temperature, topP, seed, maxTokens, stop } = settings.value;
  return (
    <Dialog title="Settings" onClose={onClose}>
      <label>
        System message of this chat
        <textarea
          rows={2}
          value={conversation.system.value}
          onInput={({ currentTarget }) => conversation.setSystem(currentTarget.value)}
        />
      </label>
      <div class="fields">
        <Amount
          label="Temperature"
          hint="0 takes the likeliest token"
          value={temperature}
          min={0}
          max={2}
          step={0.05}
          onChange={(temperature) => change({ temperature })}
        />
        <Amount
          label="Top-p"
          hint="share of probability to sample from"
          value={topP}
          min={0.01}
          max={1}
          step={0.01}
          onChange={(topP) => change({ topP })}
        />
        <Amount
          label="Seed"
          hint="empty: a new one each time"
          value={seed}
          min={0}
          max={2 ** 31 - 1}
          step={1}
          onEmpty={() => change({ seed: null })}
          onChange={(seed) => change({ seed })}
        />
        <Amount
          label="Longest answer"
          hint="in tokens"
          value={maxTokens}
          min={1}
          step={1}
          onChange={(maxTokens) => change({ maxTokens })}
        />
      </div>
      <label>
        Stop before
        <textarea
          rows={2}
          placeholder="a text a line, four at most"
          value={stop.join("\n")}
          onChange={({ currentTarget }) =>
            change({
              stop: currentTarget.value.split("\n").filter(Boolean).slice(0, 4),
            })
          }
        />
      </label>
      <div class="bar">
        <button type="button" onClick={() => change(sampling(DEFAULTS))}>
          Back to the defaults
        </button>
      </div>
    </Dialog>
  );
}

/** The settings that this dialog shows. */
function sampling({ temperature, topP, seed, maxTokens, stop }: Settings) {
  return { temperature, topP, seed, maxTokens, stop };
}

/** A number that is taken over while it is one. */
function Amount({
  label,
  hint,
  value,
  onChange,
  onEmpty,
  ...limits
}: {
  label: string;
  hint: string;
  value: number | null;
  min: number;
  max?: number;
  step: number;
  onChange(value: number): void;
  onEmpty?: () => void;
}) {
  const onInput = ({ currentTarget }: TargetedInputEvent<HTMLInputElement>) => {
    if (!currentTarget.validity.valid) return;
    if (currentTarget.value) onChange(currentTarget.valueAsNumber);
    else onEmpty?.();
  };
  return (
    <label>
      {label}
      <input
        type="number"
        required={!onEmpty}
        value={value ?? ""}
        onInput={onInput}
        {...limits}
      />
      <small>{hint}</small>
    </label>
  );
}
