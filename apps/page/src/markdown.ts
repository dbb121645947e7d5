/** An answer's Markdown -> the HTML of its blocks, without anything that acts. */

import DOMPurify from "dompurify";
import { Marked, type Token } from "marked";

const HEADINGS_BELOW = 2;
const SAFE = {
  ALLOWED_TAGS: [
    ...[
      "a",
      "blockquote",
      "br",
      "code",
      "del",
      "div",
      "em",
      "h3",
      "h4",
      "h5",
      "h6",
      "hr",
    ],
    ...["li", "ol", "p", "pre", "strong", "table", "tbody", "td", "th", "thead", "tr"],
    "ul",
  ],
  ALLOWED_ATTR: ["align", "class", "href", "rel", "start", "tabindex", "target"],
  ALLOW_DATA_ATTR: false,
  // The others that are allowed are no addresses.
  ADD_URI_SAFE_ATTR: ["align", "rel", "start", "tabindex", "target"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
};

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    // Typed tags are text, as they are in a question.
    html: ({ text }) => escaped(text),
    heading({ tokens, depth }) {
      const level = Math.min(6, depth + HEADINGS_BELOW);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    code: ({ text }) => `<pre tabindex="0"><code>${escaped(text)}</code></pre>`,
    link({ href, tokens }) {
      const text = this.parser.parseInline(tokens);
      return `<a href="${escaped(href)}" target="_blank" rel="noopener noreferrer">${text}</a>`;
    },
    // No answer loads anything.
    image: ({ href, text }) => escaped(text || href),
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    table({ header, rows }) {
      const row = (cells: typeof header) =>
        this.tablerow({ text: cells.map((cell) => this.tablecell(cell)).join("") });
      const body = rows.map(row).join("");
      return `<div class="table" tabindex="0"><table><thead>${row(header)}</thead><tbody>${body}</tbody></table></div>`;
    },
  },
});

function escaped(text: string): string {
  return text
    .replaceAll("&", "&amp;")
    .replaceAll("<", "&lt;")
    .replaceAll(">", "&gt;")
    .replaceAll('"', "&quot;");
}

/** Renders a text that grows; blocks that did not change are not rendered again. */
export class Renderer {
  private known = new Map<string, string>();
  private links = "";

  /** The HTML of each block. */
  render(text: string): string[] {
    const tokens = marked.lexer(text);
    const links = JSON.stringify(tokens.links);
    // A definition may come behind the link that it is for.
    if (links !== this.links) this.known.clear();
    this.links = links;
    const blocks = tokens.filter(({ type }) => type !== "space" && type !== "def");
    const htmls = new Map(blocks.map((token) => [token.raw, this.html(token)]));
    this.known = htmls;
    return blocks.map(({ raw }) => htmls.get(raw) ?? "");
  }

  private html(token: Token): string {
    return (
      this.known.get(token.raw) ?? DOMPurify.sanitize(marked.parser([token]), SAFE)
    );
  }
}
