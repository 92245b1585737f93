//! Turns Markdown on stdin into HTML.

use std::io::{stdin, Read};

use pulldown_cmark::{html::push_html, Parser};

fn render(text: &str) -> String {
    let mut html = String::new();
    push_html(&mut html, Parser::new(text));
    html
}

fn main() -> std::io::Result<()> {
    let mut text = String::new();
    stdin().read_to_string(&mut text)?;
    print!("{}", render(&text));
    Ok(())
}

#[test]
fn emphasis_is_rendered() {
    assert_eq!(render("*yes*"), "<p><em>yes</em></p>\n");
}
