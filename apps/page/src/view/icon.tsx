/** Lucide's icons as elements; what they mean stands beside them or in a label. */

import type { IconNode } from "lucide";
import { h } from "preact";

export function Icon({ of: nodes, solid }: { of: IconNode; solid?: boolean }) {
  return (
    <svg class={solid ? "icon solid" : "icon"} viewBox="0 0 24 24" aria-hidden="true">
      {nodes.map(([tag, attributes]) => h(tag, attributes))}
    </svg>
  );
}

/** A button that shows an icon alone. */
export function IconButton({
  icon,
  label,
  onClick,
  ...rest
}: {
  icon: IconNode;
  label: string;
  onClick(): void;
  class?: string;
  disabled?: boolean;
}) {
  return (
    <button type="button" title={label} aria-label={label} onClick={onClick} {...rest}>
      <Icon of={icon} />
    </button>
  );
}
