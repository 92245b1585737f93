//! The text of a configuration file, with the line and the value of each key.

use std::{
    borrow::Cow,
    fmt, fs,
    io::Read as _,
    ops::Range,
    path::{Path, PathBuf},
};

use serde::de::DeserializeOwned;
use toml::{
    Spanned,
    de::{DeArray, DeTable, DeValue, Deserializer},
};

use crate::build::failure::{Failure, blames_path};
use crate::daemon::problem::{Place, Problem, failure};

/// Bytes of the largest file that is read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// How many unusable values are reported at once.
const MAX_PROBLEMS: usize = 50;

/// How much of a value is quoted, in characters.
const MAX_QUOTED_CHARS: usize = 100;

/// A configuration file.
#[derive(Debug, Clone)]
pub(super) struct Source {
    path: PathBuf,
    text: String,
}

/// A setting: the names of the tables around it, its own name, and in a list the number of the element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Key(Vec<String>);

impl From<&str> for Key {
    fn from(dotted: &str) -> Self {
        Self(dotted.split('.').map(str::to_owned).collect())
    }
}

impl Key {
    pub(crate) fn child(&self, name: &str) -> Self {
        Self(self.0.iter().cloned().chain([name.to_string()]).collect())
    }

    pub(crate) fn element(&self, index: usize) -> Self {
        self.child(&element_name(index))
    }

    /// Whether this key is `other`, or in the table or list of that name.
    pub(super) fn is_in(&self, other: &Self) -> bool {
        self.0.starts_with(&other.0)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bare = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
        let shown = |name: &String| if bare(name) { name.clone() } else { format!("{name:?}") };
        // Which element it is shows in the value.
        let names = self.0.iter().filter(|name| !name.starts_with('['));
        f.write_str(&names.map(shown).collect::<Vec<_>>().join("."))
    }
}

/// The last part of the key of an element.
fn element_name(index: usize) -> String {
    format!("[{index}]")
}

impl Source {
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        let mut text = String::new();
        let read = fs::File::open(path).and_then(|file| file.take(MAX_CONFIG_BYTES + 1).read_to_string(&mut text));
        let message = || format!("can't read the configuration {path:?}");
        read.map_err(|error| match blames_path(&error) {
            true => Failure::wrong_because("configuration", message(), &error),
            false => Failure::executor_because("host", message(), &error),
        })?;
        if text.len() as u64 > MAX_CONFIG_BYTES {
            let rule = format!("the configuration {path:?} is larger than {MAX_CONFIG_BYTES} bytes");
            return Err(Failure::wrong("configuration", rule));
        }
        Ok(Self { path: path.to_owned(), text })
    }

    #[cfg(test)]
    pub(super) fn of(text: &str) -> Self {
        Self { path: "test.toml".into(), text: text.to_owned() }
    }

    /// Reads the settings. A setting with an unusable value is left out and returned as a problem, so that the other ones can
    /// be checked, too. Text that isn't TOML is a failure.
    pub(super) fn parse<T: DeserializeOwned>(&self) -> Result<(T, Vec<(Key, Problem)>), Failure> {
        let (mut document, errors) = DeTable::parse_recoverable(&self.text);
        if !errors.is_empty() {
            return Err(failure(errors.iter().map(|error| self.problem(error, None)).collect()));
        }
        let mut unread = Vec::new();
        loop {
            let error = match T::deserialize(Deserializer::from(document.clone())) {
                Ok(settings) => return Ok((settings, unread)),
                Err(error) => error,
            };
            let entry = error
                .span()
                .and_then(|span| entries(document.get_ref()).into_iter().rfind(|entry| entry.is_around(span.start)));
            let problem = self.problem(&error, entry.as_ref());
            let Some(Entry { key, .. }) = entry.filter(|_| unread.len() < MAX_PROBLEMS) else {
                return Err(failure(unread.into_iter().map(|(_, problem)| problem).chain([problem]).collect()));
            };
            remove(document.get_mut(), &key.0);
            unread.push((key, problem));
        }
    }

    fn problem(&self, error: &toml::de::Error, entry: Option<&Entry>) -> Problem {
        let place = match (entry, error.span()) {
            (Some(entry), _) => self.place_of(entry),
            (None, Some(span)) => self.place(span.start),
            (None, None) => Place { line: None, text: self.path.display().to_string() },
        };
        Problem::wrong(&place, &error.message().trim_end().replace('\n', ", "))
    }

    /// Where the file sets this key, if it does.
    pub(super) fn find(&self, key: &Key) -> Option<Place> {
        let document = DeTable::parse(&self.text).ok()?;
        let entry = entries(document.get_ref()).into_iter().find(|entry| entry.key == *key)?;
        Some(self.place_of(&entry))
    }

    fn place_of(&self, entry: &Entry) -> Place {
        let Place { line, text } = self.place(entry.name.start);
        let key = &entry.key;
        if entry.has_header {
            return Place { line, text: format!("{text}: {key}") };
        }
        let value = without_password(self.text.get(entry.value.clone()).unwrap_or_default());
        let mut shown: String = value.lines().next().unwrap_or_default().chars().take(MAX_QUOTED_CHARS).collect();
        if shown.len() < value.len() {
            shown.push('…');
        }
        Place { line, text: format!("{text}: {key} = {shown}") }
    }

    fn place(&self, offset: usize) -> Place {
        let line = self.text.get(..offset).unwrap_or(&self.text).matches('\n').count() + 1;
        Place { line: Some(line), text: format!("{}:{line}", self.path.display()) }
    }
}

/// A value without the user and the password of a URL in it.
fn without_password(value: &str) -> Cow<'_, str> {
    match (value.find("://"), value.rfind('@')) {
        (Some(begin), Some(end)) if begin < end => format!("{}…{}", &value[..begin + 3], &value[end..]).into(),
        _ => value.into(),
    }
}

/// A key in a document, and where its name and its value are.
struct Entry {
    key: Key,
    name: Range<usize>,
    value: Range<usize>,
    /// Whether it is a table under a header of its own, which is all that its spans cover.
    has_header: bool,
}

impl Entry {
    fn is_around(&self, offset: usize) -> bool {
        self.name.contains(&offset) || self.value.contains(&offset)
    }
}

/// Every key of a document, those of a table after the table's own.
fn entries(document: &DeTable<'_>) -> Vec<Entry> {
    let mut found = Vec::new();
    collect(document, &Key(Vec::new()), &mut found);
    found
}

fn collect(table: &DeTable<'_>, around: &Key, found: &mut Vec<Entry>) {
    for (name, value) in table {
        let key = around.child(name.get_ref());
        // An inline table's span begins at its brace, behind the name.
        let has_header = matches!(value.get_ref(), DeValue::Table(_)) && value.span().start <= name.span().start;
        found.push(Entry { key: key.clone(), name: name.span(), value: value.span(), has_header });
        match value.get_ref() {
            DeValue::Table(table) => collect(table, &key, found),
            DeValue::Array(elements) => found.extend(elements.iter().enumerate().map(|(index, element)| Entry {
                key: key.element(index),
                name: element.span(),
                value: element.span(),
                has_header: false,
            })),
            _ => {}
        }
    }
}

/// Removes a key, or an element of a list, from a document.
fn remove(table: &mut DeTable<'_>, path: &[String]) {
    let [name, inner @ ..] = path else { return };
    match (inner, table.get_mut(name.as_str()).map(Spanned::get_mut)) {
        ([], _) => drop(table.remove(name.as_str())),
        (_, Some(DeValue::Table(table))) => remove(table, inner),
        ([element, ..], Some(DeValue::Array(elements))) => {
            let mut kept = DeArray::new();
            let others = elements.iter().enumerate().filter(|(index, _)| element_name(*index) != *element);
            others.for_each(|(_, other)| kept.push(other.clone()));
            *elements = kept;
        }
        _ => {}
    }
}
