/** An answer as it comes, what it cost, and what can be done about it. */

import { Check, Copy, RotateCcw } from "lucide";
import { useRef, useState } from "preact/hooks";
import type { Figures } from "../api";
import { namesBoxes } from "../boxes";
import type { Answer } from "../exchange";
import { Renderer } from "../markdown";
import type { Picture } from "../pictures";
import { BoxedPicture } from "./boxed";
import { Icon, IconButton } from "./icon";

export function AnswerView({
  answer,
  pictures,
  onRetry,
}: {
  answer: Answer;
  /** The latest pictures that were asked about. */
  pictures: Picture[];
  /** Absent where it is not the last answer. */
  onRetry: (() => void) | undefined;
}) {
  const text = answer.text.value;
  const state = answer.state.value;
  return (
    <div class="answer" aria-busy={answer.running.value}>
      <h2 class="unseen-text">Answer</h2>
      {state === "asked" && <p class="waiting">Looking…</p>}
      <Markdown text={text} />
      {namesBoxes(text) && <Boxes text={text} pictures={pictures} />}
      {state === "stopped" && <p class="note">Stopped.</p>}
      {state === "cut" && (
        <p class="note">Cut at the longest answer that the settings allow.</p>
      )}
      {state === "failed" && (
        <p class="problem" role="alert">
          {answer.problem.value}
        </p>
      )}
      {!answer.running.value && (
        <div class="foot">
          {text && <CopyButton text={text} />}
          {onRetry && (
            <button type="button" class="quiet" onClick={onRetry}>
              <Icon of={RotateCcw} />
              Retry
            </button>
          )}
          {answer.figures.value && <Cost figures={answer.figures.value} />}
        </div>
      )}
    </div>
  );
}

function Markdown({ text }: { text: string }) {
  const renderer = useRef<Renderer>(null);
  renderer.current ??= new Renderer();
  return (
    <div class="markdown">
      {renderer.current.render(text).map((html, index) => (
        <div key={index} dangerouslySetInnerHTML={{ __html: html }} />
      ))}
    </div>
  );
}

function Boxes({ text, pictures }: { text: string; pictures: Picture[] }) {
  const [picture, ...more] = pictures;
  if (!picture) return null;
  if (!more.length) return <BoxedPicture text={text} picture={picture} />;
  return (
    <p class="note">
      Boxes are not drawn: the answer does not say in which of the {pictures.length}{" "}
      pictures they are.
    </p>
  );
}

function CopyButton({ text }: { text: string }) {
  const [copied, setCopied] = useState(false);
  // Missing where the page comes over plain http from afar.
  if (!navigator.clipboard) return null;
  return (
    <IconButton
      icon={copied ? Check : Copy}
      label={copied ? "Copied" : "Copy the answer"}
      onClick={async () => {
        await navigator.clipboard.writeText(text);
        setCopied(true);
        setTimeout(setCopied, 2000, false);
      }}
    />
  );
}

function Cost({ figures }: { figures: Figures }) {
  const { promptTokens, imageTokens, cachedTokens, tokens, firstToken, rate } = figures;
  const told = [
    imageTokens && `${imageTokens} of pictures`,
    cachedTokens && `${cachedTokens} known before`,
  ].filter(Boolean);
  const parts = [
    promptTokens !== null &&
      `${promptTokens} prompt tokens${told.length ? ` (${told.join(", ")})` : ""}`,
    firstToken !== null && `first token after ${firstToken.toFixed(2)} s`,
    tokens !== null &&
      `${tokens} tokens${rate ? `, ${Math.round(rate)} per second` : ""}`,
  ];
  return <p class="cost">{parts.filter(Boolean).join(" · ")}</p>;
}
