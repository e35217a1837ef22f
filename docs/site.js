// Names and keyboard access that the theme leaves out (found by axe): the search dialog, the copy
// buttons of several blocks of code, and blocks that scroll.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search")
  const name = () => {
    document.querySelectorAll(".md-code__nav").forEach((nav, n) => {
      nav.setAttribute("aria-label", `Code block ${n + 1}`)
    })
    document.querySelectorAll("pre > code").forEach((code) => code.setAttribute("tabindex", "0"))
  }
  name()
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true })
})
