/** How closely pictures are looked at. */

import { model } from "../models";
import { DETAILS, type Detail } from "../settings";

export function DetailChoice({
  value,
  onChange,
}: {
  value: Detail;
  onChange(value: Detail): void;
}) {
  const names = model.value?.mm1?.resolution;
  return (
    <label class="detail">
      <span>Resolution</span>
      <select
        value={value}
        onChange={({ currentTarget }) => onChange(currentTarget.value as Detail)}
      >
        {DETAILS.map((detail) => (
          <option key={detail} value={detail}>
            {names ? `${detail}: ${names[detail]}` : detail}
          </option>
        ))}
      </select>
    </label>
  );
}
