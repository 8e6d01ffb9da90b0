/** A text cut into what is searched: paragraphs of sentences, as they stand in it. */

const MOST_WORDS = 120; // of a passage, so that the model sees all of it
const segmenter = new Intl.Segmenter("en", { granularity: "sentence" });

/**
 * @param {string} text
 * @returns {string[][]} for each line with text its sentences; a very long one in several parts.
 */
export function paragraphsOf(text) {
  return text
    .split(/\r?\n/)
    .map((line) => [...segmenter.segment(line)].flatMap(({ segment }) => parts(segment.trim())))
    .filter((sentences) => sentences.length);
}

function parts(sentence) {
  const words = sentence.split(/\s+/).filter(Boolean);
  const found = [];
  for (let start = 0; start < words.length; start += MOST_WORDS) {
    found.push(words.slice(start, start + MOST_WORDS).join(" "));
  }
  return found;
}
