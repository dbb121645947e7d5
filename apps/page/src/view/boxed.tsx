/** A picture with the boxes that an answer names. */

import { useState } from "preact/hooks";
import { type Box, parseBoxes } from "../boxes";
import type { Picture } from "../pictures";
import { usePictureUrl } from "./pictures";

// As many as main.css has.
const COLOURS = 6;
// The part of a picture's height under which a label has no room above its box.
const TOP = 0.08;

export function BoxedPicture({ picture, text }: { picture: Picture; text: string }) {
  const url = usePictureUrl(picture);
  const [size, setSize] = useState<[number, number] | null>(null);
  const boxes = size ? parseBoxes(text, ...size) : [];
  const labels = [...new Set(boxes.map(({ label }) => label))];
  const colour = ({ label }: Box) => `colour${labels.indexOf(label) % COLOURS}`;
  if (!url) return null;
  return (
    <figure class="boxed">
      <div class="picture">
        <img
          src={url}
          alt={picture.name}
          onLoad={({ currentTarget: { naturalWidth, naturalHeight } }) =>
            setSize([naturalWidth, naturalHeight])
          }
        />
        {size &&
          boxes.map((box, index) => (
            <div key={index} class={`box ${colour(box)}`} style={place(box, ...size)}>
              {box.label && <span class={side(box, ...size)}>{box.label}</span>}
            </div>
          ))}
      </div>
      <figcaption>
        {boxes.length ? (
          <ul>
            {boxes.map((box, index) => (
              <li key={index}>
                <span class={`swatch ${colour(box)}`} />
                {box.label || "box"}: {box.box.join(", ")}
              </li>
            ))}
          </ul>
        ) : (
          size && "No box lies in the picture."
        )}
      </figcaption>
    </figure>
  );
}

function place(
  { box: [left, top, right, bottom] }: Box,
  width: number,
  height: number,
) {
  const share = (part: number, whole: number) => `${(100 * part) / whole}%`;
  return {
    left: share(left, width),
    top: share(top, height),
    width: share(right - left, width),
    height: share(bottom - top, height),
  };
}

/** Where a box's label stands: above it or inside, from its left or its right side. */
function side({ box: [left, top, right] }: Box, width: number, height: number): string {
  const inside = top < TOP * height ? "inside" : "above";
  return `${inside} ${left + right > width ? "right" : "left"}`;
}
