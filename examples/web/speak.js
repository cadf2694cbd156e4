// What a screen reader hears of an answer that streams: whole sentences, a few at a time. A live
// region around the text itself would be read anew, or piled up, with every token.

const PAUSE = 3000; // ms between announcements

export class Speaker {
  /** region: an element with aria-live, visually hidden. */
  constructor(region, { pause = PAUSE, now = () => performance.now() } = {}) {
    Object.assign(this, { region, pause, now });
    this.begin();
  }

  /** A short notice by itself. */
  say(text) {
    this.region.textContent = text;
  }

  begin() {
    this.spoken = 0;
    this.last = this.now();
  }

  /** All text of the answer so far. */
  update(text) {
    if (this.now() - this.last < this.pause) return;
    const fresh = text.slice(this.spoken);
    const end = Math.max(...[". ", "! ", "? ", ".\n", ":\n", "\n\n"].map((mark) => fresh.lastIndexOf(mark)));
    if (end < 0) return;
    this.#give(fresh.slice(0, end + 1));
    this.spoken += end + 1;
  }

  /** The rest, and how it ended. */
  end(text, closing) {
    this.#give(`${text.slice(this.spoken)} ${closing}`);
    this.spoken = text.length;
  }

  #give(text) {
    this.last = this.now();
    this.region.textContent = text.replace(/[`*#>]+/g, "").trim();
  }
}
