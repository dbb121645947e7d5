/** The page. */

import { Menu, Moon, SlidersHorizontal, SquareStack, Sun, SunMoon } from "lucide";
import { useState } from "preact/hooks";
import { current } from "../chats";
import { findModel, lack, model, unreachable } from "../models";
import { THEMES, theme } from "../settings";
import { Composer } from "./composer";
import { Dialog } from "./dialog";
import { ExamplesDialog } from "./examples";
import { History } from "./history";
import { Icon, IconButton } from "./icon";
import { KeyDialog } from "./key";
import { Log } from "./log";
import { PictureTarget } from "./pictures";
import { SettingsDialog } from "./settings";
import { Speaker } from "./speaker";

const THEME_ICONS = { auto: SunMoon, light: Sun, dark: Moon };

type Shown = "chats" | "settings" | "examples" | null;

export function App() {
  const [shown, setShown] = useState<Shown>(null);
  const close = () => setShown(null);
  const conversation = current.value;
  const shots = conversation.shots.value.length;
  const { pictures } = conversation.draft.value;
  return (
    // biome-ignore lint/a11y/noStaticElementInteractions: a short cut of the Stop button
    <div
      class="app"
      onKeyDown={(event) => {
        // In a dialog it closes that.
        const inside = (event.target as Element).closest("dialog");
        if (event.key === "Escape" && !inside) conversation.stop();
      }}
      // What misses the places for pictures would be opened in place of the page.
      onDragOver={refuseFiles}
      onDrop={refuseFiles}
    >
      <button
        type="button"
        class="skip"
        onClick={() => document.getElementById("question")?.focus()}
      >
        Skip to the question
      </button>
      <aside>
        <History />
      </aside>
      <PictureTarget
        pictures={pictures}
        onChange={(pictures) => {
          conversation.draft.value = { ...conversation.draft.value, pictures };
        }}
      >
        <header class="top">
          <IconButton
            icon={Menu}
            class="menu"
            label="Chats"
            onClick={() => setShown("chats")}
          />
          <h1>mm1</h1>
          <ModelName />
          <button type="button" class="quiet" onClick={() => setShown("examples")}>
            <Icon of={SquareStack} />
            <span>Examples{shots ? ` (${shots})` : ""}</span>
          </button>
          <button type="button" class="quiet" onClick={() => setShown("settings")}>
            <Icon of={SlidersHorizontal} />
            <span>Settings</span>
          </button>
          <ThemeButton />
        </header>
        <main>
          {conversation.notice.value && (
            <p class="notice" role="status">
              {conversation.notice.value}
            </p>
          )}
          {unreachable.value && (
            <p class="notice problem" role="alert">
              {unreachable.value}{" "}
              <button type="button" onClick={() => void findModel()}>
                Try again
              </button>
            </p>
          )}
          {model.value && lack(model.value) && (
            <p class="notice" role="status">
              {lack(model.value)}
            </p>
          )}
          <Log conversation={conversation} />
          <Composer conversation={conversation} />
        </main>
      </PictureTarget>
      <Speaker conversation={conversation} />
      {shown === "chats" && (
        <Dialog title="Chats" kind="drawer" onClose={close}>
          <History onOpen={close} />
        </Dialog>
      )}
      {shown === "settings" && (
        <SettingsDialog conversation={conversation} onClose={close} />
      )}
      {shown === "examples" && (
        <ExamplesDialog conversation={conversation} onClose={close} />
      )}
      <KeyDialog />
    </div>
  );
}

function refuseFiles(event: DragEvent) {
  if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
}

function ModelName() {
  return <p class="model">{model.value?.id}</p>;
}

function ThemeButton() {
  const next = THEMES[(THEMES.indexOf(theme.value) + 1) % THEMES.length] ?? "auto";
  return (
    <IconButton
      icon={THEME_ICONS[theme.value]}
      label={`Theme: ${theme.value}. Change to ${next}`}
      onClick={() => {
        theme.value = next;
      }}
    />
  );
}
