// The page's sources -> dist/, which the wheel holds: index.html, assets/, and the
// licences of what is bundled.
import { cp, mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { argv } from "node:process";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = new URL(".", import.meta.url);
// Where to, for a test that compares; relative to the current folder.
const out = argv[2] ?? fileURLToPath(new URL("dist", here));

await rm(out, { recursive: true, force: true });
await mkdir(`${out}/assets`, { recursive: true });
const { metafile } = await build({
  absWorkingDir: fileURLToPath(here),
  entryPoints: ["src/main.tsx", "src/main.css"],
  outdir: `${out}/assets`,
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  // Licences stand in a file of their own.
  legalComments: "none",
  metafile: true,
});
await cp(new URL("index.html", here), `${out}/index.html`);
await cp(new URL("src/icon.svg", here), `${out}/assets/icon.svg`);
await writeFile(`${out}/assets/licences.txt`, await licences(metafile));

/** The licence texts of the packages whose code is in the bundle. */
async function licences({ inputs }) {
  const pattern = /^node_modules\/((?:@[^/]+\/)?[^/]+)\//;
  const names = Object.keys(inputs).map((path) => pattern.exec(path)?.[1]);
  const texts = [];
  for (const name of [...new Set(names)].filter(Boolean).sort()) {
    const folder = new URL(`node_modules/${name}/`, here);
    const { version } = JSON.parse(await readFile(new URL("package.json", folder)));
    const file = (await readdir(folder)).find((file) => /^licen[cs]e/i.test(file));
    if (!file) throw new Error(`${name} brings no licence text`);
    const text = await readFile(new URL(file, folder), "utf8");
    texts.push(`${name} ${version}\n\n${text.trim()}\n`);
  }
  return texts.join(`\n${"-".repeat(72)}\n\n`);
}
