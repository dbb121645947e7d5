/** The questions and answers of a chat; its end stays in sight while it grows. */

import { ArrowDown } from "lucide";
import { useEffect, useRef, useState } from "preact/hooks";
import type { Conversation } from "../conversation";
import { ExchangeView } from "./exchange";
import { IconButton } from "./icon";

// Pixels from the end that still count as the end.
const NEAR = 48;

export function Log({ conversation }: { conversation: Conversation }) {
  const scroller = useRef<HTMLElement>(null);
  const content = useRef<HTMLDivElement>(null);
  const follows = useRef(true);
  // How far it was scrolled last.
  const before = useRef(0);
  const [away, setAway] = useState(false);
  const exchanges = conversation.exchanges.value;

  const toEnd = () => {
    follows.current = true;
    scroller.current?.scrollTo(0, scroller.current.scrollHeight);
  };
  // A new question is looked at, wherever one was.
  useEffect(toEnd, [conversation, exchanges.length, exchanges.at(-1)?.id]);
  useEffect(() => {
    const watch = new ResizeObserver(() => follows.current && toEnd());
    if (content.current) watch.observe(content.current);
    // It shrinks where the question below grows.
    if (scroller.current) watch.observe(scroller.current);
    return () => watch.disconnect();
  }, []);

  return (
    <div class="scroller">
      <section
        ref={scroller}
        class="log"
        // biome-ignore lint/a11y/noNoninteractiveTabindex: scrolled by the keyboard
        tabIndex={0}
        aria-label="Conversation"
        onScroll={({ currentTarget: { scrollHeight, scrollTop, clientHeight } }) => {
          // Only who scrolls back leaves the end: what came since may be long.
          if (scrollHeight - scrollTop - clientHeight < NEAR) follows.current = true;
          else if (scrollTop < before.current) follows.current = false;
          before.current = scrollTop;
          setAway(!follows.current);
        }}
      >
        <div ref={content} class="column">
          {exchanges.length === 0 && <Welcome />}
          {exchanges.map((exchange) => (
            <ExchangeView
              key={exchange.id}
              conversation={conversation}
              exchange={exchange}
            />
          ))}
        </div>
      </section>
      {away && (
        <IconButton
          icon={ArrowDown}
          class="to-end"
          label="To the end"
          onClick={toEnd}
        />
      )}
    </div>
  );
}

function Welcome() {
  return (
    <div class="welcome">
      <h2>Ask about pictures</h2>
      <p>
        Drop, paste or add them; several fit into one question. They go to your own
        server and stay in this browser.
      </p>
    </div>
  );
}
