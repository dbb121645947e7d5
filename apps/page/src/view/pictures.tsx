/** Pictures of a question: chosen, dropped or pasted, shown small, and taken out again. */

import { ImagePlus, X } from "lucide";
import type { ComponentChildren, TargetedDragEvent } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { ACCEPT, type Picture, sort } from "../pictures";
import { Icon, IconButton } from "./icon";

/** An address of the picture for as long as it is shown. */
export function usePictureUrl({ blob }: Picture): string {
  const [url, setUrl] = useState("");
  useEffect(() => {
    const made = URL.createObjectURL(blob);
    setUrl(made);
    return () => URL.revokeObjectURL(made);
  }, [blob]);
  return url;
}

export function Thumbnail({ picture }: { picture: Picture }) {
  const url = usePictureUrl(picture);
  const [unseen, setUnseen] = useState(false);
  if (unseen) return <span class="unseen">{picture.name}</span>;
  if (!url) return <span class="unseen" />;
  return <img src={url} alt={picture.name} onError={() => setUnseen(true)} />;
}

export function Thumbnails({ pictures }: { pictures: Picture[] }) {
  if (!pictures.length) return null;
  return (
    <ul class="thumbnails" aria-label="Pictures">
      {pictures.map((picture) => (
        <li key={picture.id}>
          <Thumbnail picture={picture} />
        </li>
      ))}
    </ul>
  );
}

interface Taking {
  pictures: Picture[];
  onChange(pictures: Picture[]): void;
}

/** Takes what is dropped or pasted on what it holds. */
export function PictureTarget({
  pictures,
  onChange,
  children,
}: Taking & { children: ComponentChildren }) {
  const [over, setOver] = useState(false);
  const [others, setOthers] = useState<string[]>([]);
  const take = (event: Event, data: DataTransfer | null) => {
    if (!data?.files.length) return; // Text is the field's own.
    event.preventDefault();
    event.stopPropagation();
    const found = sort(data.files);
    setOthers(found.others);
    onChange([...pictures, ...found.pictures]);
  };
  const isFiles = (event: TargetedDragEvent<HTMLElement>) =>
    event.dataTransfer?.types.includes("Files");
  return (
    // biome-ignore lint/a11y/noStaticElementInteractions: the keyboard has AddPictures
    <div
      class={over ? "target over" : "target"}
      onDragOver={(event) => {
        if (!isFiles(event)) return;
        event.preventDefault();
        event.stopPropagation();
        setOver(true);
      }}
      onDragLeave={(event) => {
        if (!event.currentTarget.contains(event.relatedTarget as Node)) setOver(false);
      }}
      onDrop={(event) => {
        setOver(false);
        take(event, event.dataTransfer);
      }}
      onPaste={(event) => take(event, event.clipboardData)}
    >
      {children}
      {others.length > 0 && (
        <p class="problem" role="alert">
          {others.length > 1 ? `${others.join(", ")} are` : `${others[0]} is`} not a
          picture.
        </p>
      )}
    </div>
  );
}

export function RemovablePictures({ pictures, onChange }: Taking) {
  if (!pictures.length) return null;
  return (
    <ul class="thumbnails" aria-label="Pictures to send">
      {pictures.map((picture) => (
        <li key={picture.id}>
          <Thumbnail picture={picture} />
          <IconButton
            icon={X}
            label={`Remove ${picture.name}`}
            onClick={() => onChange(pictures.filter(({ id }) => id !== picture.id))}
          />
        </li>
      ))}
    </ul>
  );
}

export function AddPictures({ pictures, onChange }: Taking) {
  const input = useRef<HTMLInputElement>(null);
  return (
    <>
      <button type="button" class="quiet" onClick={() => input.current?.click()}>
        <Icon of={ImagePlus} />
        <span>Add pictures</span>
      </button>
      <input
        ref={input}
        type="file"
        aria-label="Pictures"
        accept={ACCEPT}
        multiple
        hidden
        onChange={({ currentTarget }) => {
          onChange([...pictures, ...sort(currentTarget.files ?? []).pictures]);
          // The same file may be chosen again.
          currentTarget.value = "";
        }}
      />
    </>
  );
}
