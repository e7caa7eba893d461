// What is measured inside a page; test_browser.py calls these functions.

const open = () => document.querySelectorAll('details').forEach(details => { details.open = true })

/** Every piece of text that is shown, with its element. */
const texts = () => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = []
  while (walker.nextNode()) {
    const node = walker.currentNode, range = document.createRange()
    range.selectNodeContents(node)
    const shown = range.getClientRects().length && node.parentElement.checkVisibility({visibilityProperty: true})
    if (node.data.trim() && shown) found.push([node.data.trim().slice(0, 60), node.parentElement])
  }
  return found
}

const ancestors = element => element ? [element, ...ancestors(element.parentElement)] : []

const rgba = colour => {
  const parts = colour.match(/^rgba?\(([\d.]+), ([\d.]+), ([\d.]+)(?:, ([\d.]+))?\)$/)
  if (!parts) throw new Error(`not a colour that this check can read: ${colour}`)
  return [...parts.slice(1, 4).map(Number), Number(parts[4] ?? 1)]
}

const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1)

const background = element => {
  if (!element) throw new Error('nothing opaque lies under the text')
  const style = getComputedStyle(element), own = rgba(style.backgroundColor)
  if (style.backgroundImage !== 'none') throw new Error('text on a picture')
  return own[3] === 1 ? own : over(own, background(element.parentElement))
}

/** Relative luminance, as WCAG 2 defines it. */
const luminance = colour => {
  const [red, green, blue] = colour.slice(0, 3).map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue
}

/** Of every text the contrast with what lies under it, 1 to 21. */
const contrasts = () => texts().map(([text, element]) => {
  const style = getComputedStyle(element), under = background(element)
  const ink = rgba(element instanceof SVGElement ? style.fill : style.color)
  for (const layer of ancestors(element)) ink[3] *= Number(getComputedStyle(layer).opacity)
  const [low, high] = [luminance(under), luminance(over(ink, under))].sort((a, b) => a - b)
  return [text, (high + 0.05) / (low + 0.05)]
})

/** Of every text its size in CSS pixels; a plot's is scaled with the plot. */
const sizes = () => texts().map(([text, element]) => {
  const {a, b} = element instanceof SVGElement ? element.getScreenCTM() : {a: 1, b: 0}
  return [text, parseFloat(getComputedStyle(element).fontSize) * Math.hypot(a, b)]
})

/** What lies right of the window. `scrolls`: a box that scrolls by itself may hold more than it shows. */
const beyond = scrolls => {
  const boxed = element => scrolls && ancestors(element.parentElement)
    .some(box => box !== document.body && ['auto', 'scroll'].includes(getComputedStyle(box).overflowX))
  return [...document.body.querySelectorAll('*:not(svg *)')]
    .filter(element => element.checkVisibility() && !boxed(element))
    .filter(element => element.getBoundingClientRect().right > innerWidth + 0.5)
    .map(element => element.outerHTML.slice(0, 80))
}

/** The titles of details whose content is not shown. */
const folded = () => [...document.querySelectorAll('details > :not(summary)')]
  .filter(part => !part.checkVisibility() || !part.getBoundingClientRect().height)
  .map(part => part.parentElement.querySelector('summary').textContent.trim())
