//! Somebody who looks at the page, without a mouse.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::{BUILDS, OUTPUT, TENANT, chromium::Chromium};

/// Of all that is hostile in command lines and the log.
const MARKUP: &str = "<img src=//example.invalid/x onerror=alert(1)>";

/// Most characters of a page, however many builds there are and however long a log is.
const MOST_PAGE_CHARS: u64 = 1 << 20;

/// A link to a build in the list.
const BUILD: &str = "e.closest('td.command') != null";

pub(crate) struct Look<'a> {
    pub(crate) browser: Chromium,
    pub(crate) address: &'a str,
    pub(crate) pictures: &'a Path,
}

impl Look<'_> {
    pub(crate) fn at_all(&mut self, token: &str) -> Result<()> {
        self.signs_in(token)?;
        self.at_builds()?;
        self.at_one_build()?;
        self.at_a_log()?;
        self.follows_a_log()?;
        self.follows("e.textContent == 'Daemon'")?;
        let builds = format!("{BUILDS} builds, ");
        let words = ["1 of 1", "the end of another build", "in use, ", " of 100.00 GiB", "1 build, which may grow"];
        self.shows("daemon", &[&words[..], &[TENANT, &builds, " of 1.00 TiB", " of 1.00 GiB"]].concat())?;
        self.complains_of_nothing()
    }

    /// Chromium reports the status 401 of the page that asks for a token, and must report nothing else.
    fn signs_in(&mut self, token: &str) -> Result<()> {
        self.browser.open(self.address)?;
        self.shows("sign-in", &["Make a token with"])?;
        // HTTP/1.1 has words for the status in the parentheses, HTTP/2 has none.
        let status = "Failed to load resource: the server responded with a status of 401 (";
        let expected = format!("{}/: {status}", self.address);
        self.browser.complaints.retain(|complaint| !complaint.starts_with(&expected));
        self.browser.type_over(token)?;
        self.browser.enter()?;
        self.shows("builds", &["Builds", MARKUP, TENANT, "Older"])
    }

    fn at_builds(&mut self) -> Result<()> {
        self.browser.open(self.address)?;
        self.browser.press("Tab")?;
        let first = self.browser.value("document.activeElement.className")?;
        ensure!(first == "skip", "the first Tab leads to {first}, not past the header");
        self.follows("e.textContent == 'Older'")?;
        self.shows("older", &[MARKUP, TENANT, "Newest"])?;
        // The number of the first build.
        self.filters(None, "> 0")?;
        while self.rows()? == 0 {
            self.follows("e.textContent == 'Older'")?;
        }
        self.shows("first", &[MARKUP, TENANT])?;
        self.filters(Some("w"), "")?;
        self.shows("active", &["as many builds run as the budget allows", "step"])?;
        self.filters(Some("f"), "exit 3")?;
        let rows = self.rows()?;
        ensure!(rows == 1, "the search finds {rows} builds, not one");
        self.follows(BUILD)?;
        self.shows("failure", &["Failure of the build", "cofferdam build --rebuild"])
    }

    fn at_one_build(&mut self) -> Result<()> {
        self.filters(Some("s"), "HOSTILE")?;
        self.follows(BUILD)?;
        self.shows("build", &["Signed provenance", MARKUP, OUTPUT])?;
        let curves = self.browser.value("document.querySelectorAll('svg.curve').length")?;
        ensure!(curves == 2, "the build has {curves} curves");
        self.follows("e.closest('#outputs ~ table') != null")?;
        self.shows("output", &[OUTPUT, "<b>.html"])?;
        let tar = self.downloads("Download as tar")?;
        let mut tar = tar::Archive::new(&tar[..]);
        let names = tar.entries()?.map(|entry| Ok(entry?.path()?.into_owned())).collect::<Result<Vec<_>>>()?;
        ensure!(names.iter().any(|name| name == Path::new("<b>.html")), "the archive has {names:?}");
        self.follows("e.textContent == 'sub'")?;
        self.shows("directory", &["tool", "program"])?;
        self.follows("e.textContent == 'tool'")?;
        self.shows("file", &["Download as NAR"])?;
        let tool = self.downloads("Download")?;
        ensure!(tool.starts_with(b"\x7fELF"), "the program is something else");
        self.follows("e.textContent == 'Build'")
    }

    fn at_a_log(&mut self) -> Result<()> {
        self.follows("e.textContent == 'Show'")?;
        self.shows("log", &["needle at the end"])?;
        let log = self.downloads("Download")?;
        ensure!(log.len() > 100_000_000 && log.ends_with(b" at the end\n"), "the log has {} bytes", log.len());
        self.follows("e.textContent == 'Beginning'")?;
        self.shows("log-beginning", &["orange", MARKUP])?;
        self.finds("ORANGE")?;
        self.shows("found", &["1 line found", MARKUP])?;
        self.finds("needle")?;
        while self.browser.value("document.querySelector('mark') == null")? == true {
            self.follows("e.textContent == 'Search further'")?;
        }
        self.shows("found-at-the-end", &["needle at the end"])
    }

    /// A page that goes on as long as its build does.
    fn follows_a_log(&mut self) -> Result<()> {
        self.filters(Some("w"), "step")?;
        self.follows(BUILD)?;
        self.shows("running", &["so far"])?;
        self.browser.tab_to("e.textContent == 'Follow'")?;
        self.browser.press("Enter")?;
        let last = "Number(document.querySelector('pre.log')?.innerText.match(/step (\\d+)\\n$/)?.[1])";
        self.browser.wait_for(&format!("{last} > 0"))?;
        let before = self.browser.value(last)?;
        self.browser.wait_for(&format!("{last} > {before} + 2"))?;
        let after = self.browser.value(last)?;
        println!("the followed log has grown from step {before} to step {after}");
        self.shows("follow", &["This page grows with the log"])
    }

    /// Chromium has complained of nothing and asked nobody else. It would have: it does when markup gets into the page.
    fn complains_of_nothing(&mut self) -> Result<()> {
        let browser = &mut self.browser;
        let is_other = |asked: &&String| !asked.starts_with(self.address) && *asked != "about:blank";
        let others: Vec<_> = browser.asked.iter().filter(is_other).collect();
        ensure!(others.is_empty(), "the page has {others:?} loaded");
        ensure!(browser.complaints.is_empty(), "Chromium complains: {:#?}", browser.complaints);
        browser.value(
            "const made = (name, fields) => Object.assign(document.createElement(name), fields);
            document.body.append(made('script', { textContent: 'window.ran = 1' }), made('img', { src: '/icon.png' }),
                made('img', { src: '//example.invalid/x' }))",
        )?;
        for word in ["script-src", "img-src", "404"] {
            browser.wait_for_complaint(word)?;
        }
        ensure!(browser.value("window.ran == undefined")? == true, "a script has run");
        println!("Chromium complains of nothing, and of a script and a picture that are put into the page");
        Ok(())
    }

    /// Fills in the form above the list, the state by the first letter of a choice.
    fn filters(&mut self, state: Option<&str>, words: &str) -> Result<()> {
        self.browser.open(self.address)?;
        if let Some(letter) = state {
            self.browser.tab_to("e.id == 'state'")?;
            self.browser.press(letter)?;
        }
        self.browser.tab_to("e.id == 'q'")?;
        self.browser.type_over(words)?;
        self.browser.enter()
    }

    fn rows(&mut self) -> Result<u64> {
        self.browser.value("document.querySelectorAll('tbody tr').length")?.as_u64().context("it is a count")
    }

    /// Searches in the log.
    fn finds(&mut self, text: &str) -> Result<()> {
        self.browser.tab_to("e.id == 'find'")?;
        self.browser.type_over(text)?;
        self.browser.enter()
    }

    /// Goes to the first link that this expression, of `e`, tells.
    fn follows(&mut self, link: &str) -> Result<()> {
        self.browser.tab_to(link)?;
        self.browser.enter()
    }

    fn downloads(&mut self, link: &str) -> Result<Vec<u8>> {
        self.browser.tab_to(&format!("e.textContent == '{link}'"))?;
        let (file, name) = self.browser.download()?;
        let contents = fs::read(&file).with_context(|| format!("{name} can't be read"))?;
        println!("{link}: {name}, {} KiB in {} ms", contents.len() >> 10, self.browser.took.as_millis());
        fs::remove_file(file)?;
        Ok(contents)
    }

    /// The page has these words, has nothing of a build's as markup, and fits into narrow and wide windows. In light and in dark
    /// colours its text can be read.
    fn shows(&mut self, name: &str, words: &[&str]) -> Result<()> {
        let browser = &mut self.browser;
        let took = browser.took.as_millis();
        let text = browser.value("document.body.innerText")?;
        let text = text.as_str().unwrap_or_default();
        for word in words {
            ensure!(text.contains(word), "no {word:?} in {text}");
        }
        let foreign =
            browser.value("document.querySelectorAll('script, img, b, iframe, [style], [onerror]').length")?;
        ensure!(foreign == 0, "{name} has {foreign} elements of a build's");
        let chars = browser.value("document.documentElement.outerHTML.length")?.as_u64().unwrap_or(u64::MAX);
        ensure!(chars <= MOST_PAGE_CHARS, "{name} has {chars} characters");
        for (width, scheme) in [(320, "light"), (320, "dark"), (1100, "dark"), (1100, "light")] {
            browser.look(width, scheme)?;
            let needs = browser.value("document.documentElement.scrollWidth")?;
            ensure!(needs.as_u64().is_some_and(|needs| needs <= width.into()), "{name} is {needs} wide, not {width}");
            let faint = browser.value(FAINT)?;
            ensure!(faint == json!([]), "{name} in {scheme} colours has faint text: {faint}");
            browser.picture(&self.pictures.join(format!("{name}-{width}-{scheme}.png")))?;
        }
        println!("{name}: loaded in {took} ms, {} KiB; escaped, fits, light and dark can be read", chars >> 10);
        Ok(())
    }
}

/// Lists text with less contrast than WCAG 2 asks for (level AA), beside that whose colours a build has chosen.
const FAINT: &str = "(() => {
    const parse = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(level => level / 255)
        .map(level => level <= 0.04045 ? level / 12.92 : ((level + 0.055) / 1.055) ** 2.4)
        .reduce((sum, level, at) => sum + level * [0.2126, 0.7152, 0.0722][at], 0);
    const back = e => { for (; e; e = e.parentElement) {
        const found = parse(getComputedStyle(e).backgroundColor);
        if (found.length == 3 || found[3] == 1) return found;
    } return [255, 255, 255]; };
    const faint = [];
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const e = texts.currentNode.parentElement;
        if (!texts.currentNode.data.trim() || e.closest('pre.log span, .hits span, meter, select, title')) continue;
        const [one, other] = [light(parse(getComputedStyle(e).color)), light(back(e))];
        const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
        if (ratio < 4.5) faint.push(`${texts.currentNode.data.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
    }
    return faint.slice(0, 10);
})()";
