/** Reads an answer to a screen reader as it comes, sentence by sentence. */

import type { Conversation } from "../conversation";
import { ended, sentences } from "../speech";

export function Speaker({ conversation }: { conversation: Conversation }) {
  const answer = conversation.exchanges.value.at(-1)?.answer;
  // What was answered before the page was opened is not news.
  const said = answer && conversation.spoken === answer ? answer : null;
  const running = said?.running.value ?? false;
  return (
    <div class="unseen-text" aria-live="polite">
      {running && <p>The answer is being written.</p>}
      {said &&
        sentences(said.text.value, !running).map((sentence, index) => (
          <p key={index}>{sentence}</p>
        ))}
      {said && !running && <p>{ended(said.state.value)}</p>}
    </div>
  );
}
