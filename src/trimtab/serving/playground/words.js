// Numbers for people, written as the comparison report writes them.

export function bytes(size) {
  if (!Number.isFinite(size)) return "–";
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (size < 1024) return unit === "B" ? `${size.toFixed(0)} B` : `${size.toFixed(1)} ${unit}`;
    size /= 1024;
  }
  return `${size.toFixed(1)} TiB`;
}

export function digits(value) {
  if (!Number.isFinite(value)) return "–";
  if (value >= 100) return Math.round(value).toLocaleString("en");
  return value.toFixed(value >= 10 ? 1 : 2);
}

export function seconds(value) {
  if (!Number.isFinite(value)) return "–";
  return value >= 1 ? `${value.toFixed(2)} s` : `${digits(1000 * value)} ms`;
}

export function times(ratio) {
  return Number.isFinite(ratio) ? `${digits(ratio)}×` : "–";
}

export function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}
