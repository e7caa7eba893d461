// What is measured inside a page; test_browser.py calls these functions and judges what they return.

const open = () => document.querySelectorAll('details').forEach(details => { details.open = true })

/** Of each link its address and the name of what it should lead to; in the matrix family/case. */
const links = () => [...document.querySelectorAll('a[href]')].map(link => {
  const cell = link.closest('.matrix td:not(.why)')
  if (!cell) return [link.getAttribute('href'), link.textContent]
  const heading = cell.closest('table').tHead.rows[0].cells[cell.cellIndex]
  return [link.getAttribute('href'), `${heading.textContent}/${cell.parentElement.cells[0].textContent}`]
})

const unlinked = () => [...document.querySelectorAll('.matrix td:is(.FAIL, .ERROR, .KNOWN, .UNMEASURED)')]
  .filter(cell => !cell.querySelector('a[href]')).map(cell => cell.title)

/** What is wrong with the place that a click led to; null where nothing is. */
const arrival = name => {
  const found = document.getElementById(decodeURIComponent(location.hash.slice(1)))
  if (!found) return 'points at nothing'
  const title = found.closest('details')?.querySelector('summary') ?? found
  if (!title.textContent.includes(name)) return `leads to ${title.textContent.trim()}`
  const hidden = [found, title].some(element => {
    const box = element.getBoundingClientRect()
    return !element.checkVisibility() || !box.height || box.top < 0 || box.top >= innerHeight
  })
  return hidden ? 'is not in view' : null
}

/** Every piece of text that is shown, with its element and its node. */
const texts = () => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = []
  while (walker.nextNode()) {
    const node = walker.currentNode, range = document.createRange()
    range.selectNodeContents(node)
    const shown = range.getClientRects().length && node.parentElement.checkVisibility({visibilityProperty: true})
    if (node.data.trim() && shown) found.push([node.data.trim().slice(0, 60), node.parentElement, node])
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

/** Short words that are broken over two lines, because their column is too narrow. */
const broken = () => texts().flatMap(([, , node]) => [...node.data.matchAll(/(?<!\S)[\w.,:+]{2,12}(?!\S)/g)]
  .filter(word => {
    const range = document.createRange()
    range.setStart(node, word.index)
    range.setEnd(node, word.index + word[0].length)
    return range.getClientRects().length > 1
  })
  .map(word => word[0]))

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
