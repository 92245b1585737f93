//! Each module of this crate uses only those below it.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The modules, top first.
const ORDER: [&str; 23] = [
    "cli",
    "daemon",
    "frontend",
    "scheduler",
    "quota",
    "telemetry",
    "store_paths",
    "records",
    "build",
    "limits",
    "outputs",
    "devices",
    "machine",
    "network",
    "oci",
    "request",
    "tenants",
    "disk",
    "state",
    "privacy",
    "quantity",
    "text",
    "niceness",
];

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).expect("the source is there").map(|entry| entry.expect("it can be read").path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// The names that follow `crate::` in source code, those in braces included.
fn used(source: &str) -> Vec<&str> {
    let ident = |text: &str| text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let mut names = Vec::new();
    for (at, found) in source.match_indices("crate::") {
        let rest = &source[at + found.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            names.push(&rest[..ident(rest)]);
            continue;
        };
        let (mut depth, mut is_start) = (1, true);
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => is_start = true,
                c if is_start && c.is_alphabetic() => {
                    names.push(&group[at..at + ident(&group[at..])]);
                    is_start = false;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    names
}

#[test]
fn no_module_uses_one_above_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let position = |name: &str| ORDER.iter().position(|known| *known == name);
    let mut wrong = Vec::new();
    for path in files(&src) {
        let inside = path.strip_prefix(&src).expect("it is in there");
        let module = inside.components().next().and_then(|first| first.as_os_str().to_str()).unwrap_or_default();
        let Some(here) = position(module.trim_end_matches(".rs")) else { continue };
        let source = fs::read_to_string(&path).expect("it can be read");
        let above = used(&source).into_iter().filter(|name| position(name).is_some_and(|there| there < here));
        wrong.extend(above.map(|name| format!("{} uses {name}", inside.display())));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn uses_are_found_in_every_form() {
    let source = "use crate::{a::{self, b}, c,\n    d::E};\nuse crate::f;\ncrate::g::h(crate::{i})";
    assert_eq!(used(source), ["a", "c", "d", "f", "g", "i"]);
}
