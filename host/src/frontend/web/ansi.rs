//! The log of an untrusted build as HTML: its text and colours, and nothing else of it.

use std::mem;

use vte::{Params, Parser, Perform};

use crate::text::{changes_direction, cut_character};

/// Turns one stream of bytes into HTML. The stream may be split anywhere. What is returned for each part has no open element.
#[derive(Default)]
pub(super) struct Ansi {
    parser: Parser,
    written: Written,
    /// The first bytes of an incomplete character. The parser never sees a split character: vte 0.15 loses text after some of them.
    cut: Vec<u8>,
}

/// How text looks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Style {
    /// By its number among 256.
    colour: Option<u8>,
    background: Option<u8>,
    is_bold: bool,
    is_faint: bool,
    is_italic: bool,
    is_underlined: bool,
    is_reversed: bool,
}

#[derive(Default)]
struct Written {
    html: String,
    style: Style,
    /// That of the open element, if there is one.
    open: Option<Style>,
    /// Whether the last character was a carriage return. It begins a new line (progress bars), unless a newline follows.
    returned: bool,
}

impl Ansi {
    /// The next bytes as HTML.
    pub(super) fn html(&mut self, bytes: &[u8]) -> String {
        let mut joined = mem::take(&mut self.cut);
        joined.extend_from_slice(bytes);
        let (whole, cut) = joined.split_at(joined.len() - cut_character(&joined));
        self.cut = cut.to_vec();
        self.parser.advance(&mut self.written, whole);
        self.written.close();
        mem::take(&mut self.written.html)
    }
}

impl Written {
    fn close(&mut self) {
        if self.open.take().is_some() {
            self.html.push_str("</span>");
        }
    }

    fn push(&mut self, c: char) {
        if mem::take(&mut self.returned) && c != '\n' {
            self.html.push('\n');
        }
        let wanted = Some(self.style).filter(|style| *style != Style::default());
        if self.open != wanted {
            self.close();
            if let Some(style) = wanted {
                style.open(&mut self.html);
                self.open = wanted;
            }
        }
        match c {
            '&' => self.html.push_str("&amp;"),
            '<' => self.html.push_str("&lt;"),
            '>' => self.html.push_str("&gt;"),
            '"' => self.html.push_str("&quot;"),
            '\'' => self.html.push_str("&#39;"),
            c => self.html.push(c),
        }
    }
}

impl Style {
    /// Classes of the style sheet, since the page allows no style of an element's own.
    fn open(self, html: &mut String) {
        let (colour, background) = match self.is_reversed {
            true => (self.background.or(Some(0)), self.colour.or(Some(7))),
            false => (self.colour, self.background),
        };
        let numbered = [("f", colour), ("b", background)];
        let mut classes: Vec<String> =
            numbered.into_iter().filter_map(|(letter, number)| Some(format!("{letter}{}", number?))).collect();
        for (name, has) in
            [("bo", self.is_bold), ("fa", self.is_faint), ("it", self.is_italic), ("un", self.is_underlined)]
        {
            classes.extend(has.then(|| name.to_owned()));
        }
        html.push_str("<span class=\"");
        html.push_str(&classes.join(" "));
        html.push_str("\">");
    }

    /// "Select graphic rendition" of ECMA-48.
    fn select(&mut self, params: &Params) {
        let mut params = params.iter();
        while let Some(param) = params.next() {
            let Some(&code) = param.first() else { continue };
            let low = |code: u16| u8::try_from(code).ok();
            match code {
                0 => *self = Self::default(),
                1 => self.is_bold = true,
                2 => self.is_faint = true,
                3 => self.is_italic = true,
                4 => self.is_underlined = param.get(1) != Some(&0),
                7 => self.is_reversed = true,
                22 => (self.is_bold, self.is_faint) = (false, false),
                23 => self.is_italic = false,
                24 => self.is_underlined = false,
                27 => self.is_reversed = false,
                30..=37 => self.colour = low(code - 30),
                40..=47 => self.background = low(code - 40),
                90..=97 => self.colour = low(code - 90 + 8),
                100..=107 => self.background = low(code - 100 + 8),
                39 => self.colour = None,
                49 => self.background = None,
                38 | 48 => {
                    let colour = match param.len() {
                        1 => numbered(&mut params.by_ref().map(|param| param.first().copied().unwrap_or(0))),
                        // With colons: the second form has an empty parameter for a colour space.
                        length => {
                            let skipped = if param.get(1) == Some(&2) && length >= 6 { 1 } else { 0 };
                            let rest = param[2..].iter().skip(skipped);
                            numbered(&mut param[1..2].iter().chain(rest).copied())
                        }
                    };
                    if let Some(colour) = colour {
                        *(if code == 38 { &mut self.colour } else { &mut self.background }) = Some(colour);
                    }
                }
                _ => {}
            }
        }
    }
}

/// A colour by its number, or the nearest one to a mixture of red, green and blue.
fn numbered(params: &mut dyn Iterator<Item = u16>) -> Option<u8> {
    match params.next()? {
        5 => u8::try_from(params.next()?).ok(),
        2 => {
            let mut level = || Some(u8::try_from((params.next()?.min(255) * 5 + 127) / 255).unwrap_or(5));
            let (red, green, blue) = (level()?, level()?, level()?);
            Some(16 + 36 * red + 6 * green + blue)
        }
        _ => None,
    }
}

impl Perform for Written {
    fn print(&mut self, c: char) {
        if !c.is_control() && !changes_direction(c) {
            self.push(c);
        }
    }

    fn execute(&mut self, byte: u8) {
        match byte {
            b'\n' | b'\t' => self.push(byte.into()),
            b'\r' => self.returned = true,
            _ => {}
        }
    }

    fn csi_dispatch(&mut self, params: &Params, intermediates: &[u8], is_ignored: bool, action: char) {
        if action == 'm' && intermediates.is_empty() && !is_ignored {
            self.style.select(params);
        }
    }
}

/// The style sheet of the colours from 16 on: a cube of 6 x 6 x 6, and 24 shades of grey.
pub(super) fn style_sheet() -> String {
    use std::fmt::Write as _;
    let mut sheet = String::new();
    for number in 16..=255_u16 {
        let level = |step: u16| if step == 0 { 0 } else { 55 + 40 * step };
        let (red, green, blue) = match number {
            232.. => (8 + 10 * (number - 232), 8 + 10 * (number - 232), 8 + 10 * (number - 232)),
            _ => (level((number - 16) / 36), level((number - 16) / 6 % 6), level((number - 16) % 6)),
        };
        let _ = writeln!(sheet, ".f{number}{{color:#{red:02x}{green:02x}{blue:02x}}}");
        let _ = writeln!(sheet, ".b{number}{{background:#{red:02x}{green:02x}{blue:02x}}}");
    }
    sheet
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn whole(bytes: &[u8]) -> String {
        Ansi::default().html(bytes)
    }

    #[test]
    fn text_is_escaped_and_colours_are_classes() {
        for (bytes, expected) in [
            (b"<script>alert(1)</script>".as_slice(), "&lt;script&gt;alert(1)&lt;/script&gt;"),
            (b"\"'&\n\t", "&quot;&#39;&amp;\n\t"),
            (b"\x1b[31mred\x1b[0m plain", "<span class=\"f1\">red</span> plain"),
            (b"\x1b[1;92;44mx", "<span class=\"f10 b4 bo\">x</span>"),
            (b"\x1b[38;5;208mx\x1b[39my", "<span class=\"f208\">x</span>y"),
            (b"\x1b[48;2;255;0;0mx\x1b[m", "<span class=\"b196\">x</span>"),
            (
                b"\x1b[38:2::0:255:0mx\x1b[m\x1b[38:5:9my\x1b[m",
                "<span class=\"f46\">x</span><span class=\"f9\">y</span>",
            ),
            (b"\x1b[38mx\x1b[38;5m\x1b[38;2;1my\x1b[38;5;999mz", "xyz"),
            (b"\x1b[7mx\x1b[27my", "<span class=\"f0 b7\">x</span>y"),
            (b"\x1b]8;;javascript:alert(1)\x1b\\link\x1b]8;;\x1b\\", "link"),
            (b"\x1b]0;<title>\x07after", "after"),
            (b"10%\r20%\r\n", "10%\n20%\n"),
            ("\u{202e}backwards\u{0}".as_bytes(), "backwards"),
            (b"\xff\xfe", "\u{fffd}\u{fffd}"),
        ] {
            assert_eq!(whole(bytes), expected, "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn a_style_goes_on_in_the_next_part() {
        let mut ansi = Ansi::default();
        assert_eq!(ansi.html(b"\x1b[3"), "");
        assert_eq!(ansi.html(b"1ma"), "<span class=\"f1\">a</span>");
        assert_eq!(ansi.html(b"b\x1b[m\xf0\x9f"), "<span class=\"f1\">b</span>");
        assert_eq!(ansi.html(b"\xa6\x80"), "\u{1f980}");
    }

    #[test]
    fn every_colour_has_a_class() {
        let sheet = style_sheet();
        for class in
            [".f16{color:#000000}", ".f208{color:#ff8700}", ".b231{background:#ffffff}", ".f255{color:#eeeeee}"]
        {
            assert!(sheet.contains(class), "{class}");
        }
    }

    /// Without the elements that the page itself makes.
    fn text(html: &str) -> String {
        let mut text = String::new();
        for part in html.split("<span class=\"") {
            let part = if text.is_empty() && html.starts_with(part) {
                part
            } else {
                part.split_once("\">").map_or(part, |(_, rest)| rest)
            };
            text.push_str(&part.replace("</span>", ""));
        }
        text
    }

    proptest! {
        #[test]
        fn no_bytes_make_markup_and_cuts_change_no_text(
            bytes in proptest::collection::vec(
                prop_oneof![any::<u8>(), Just(0x1b), Just(b'['), Just(b'<'), Just(b'm'), Just(b'1'), Just(b';'), Just(b'\r')],
                0..64,
            ),
            cut in 0..64_usize,
        ) {
            let (first, second) = bytes.split_at(cut.min(bytes.len()));
            let mut ansi = Ansi::default();
            let pieces = ansi.html(first) + &ansi.html(second);
            let shown = text(&pieces);
            prop_assert!(!shown.contains(['<', '>', '"', '\'']), "{shown}");
            prop_assert!(!shown.contains(|c: char| c.is_control() && !matches!(c, '\n' | '\t')));
            prop_assert_eq!(shown, text(&whole(&bytes)));
        }
    }
}
