//! The attributes of a derivation that its builder obeys.

mod graph;
mod json;
mod shell;
#[cfg(test)]
mod tests;

use serde_json::{Map, Value};

pub use graph::Graph;

use crate::{Derivation, Output, StorePath, derivation::placeholder};

/// Bytes of the largest `__json`, which takes many times as much in memory.
const MAX_JSON_BYTES: usize = 4 * 1024 * 1024;

/// Words of the longest list.
const MAX_WORDS: usize = 16 * 1024;

/// A derivation's attributes: its environment, or structured.
#[derive(Debug, Clone)]
pub struct Attributes<'a> {
    derivation: &'a Derivation,
    structured: Option<Map<String, Value>>,
}

/// What an output must keep to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checks {
    /// The only paths that it may refer to: store paths, and names of outputs.
    pub allowed_references: Option<Vec<String>>,
    /// The only paths that may be in its closure.
    pub allowed_requisites: Option<Vec<String>>,
    /// Paths that it must not refer to.
    pub disallowed_references: Option<Vec<String>>,
    /// Paths that must not be in its closure.
    pub disallowed_requisites: Option<Vec<String>>,
    /// Bytes of its largest NAR.
    pub max_size: Option<u64>,
    /// Bytes of the largest NARs in its closure, together.
    pub max_closure_size: Option<u64>,
    /// Whether it may always be in its own closure.
    pub ignores_itself: bool,
}

/// The files `.attrs.json` and `.attrs.sh` of a build with structured attributes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttributeFiles {
    /// All attributes.
    pub json: Vec<u8>,
    /// Those that a shell can have, as its declarations.
    pub shell: Vec<u8>,
}

impl<'a> Attributes<'a> {
    /// Reads them.
    ///
    /// # Errors
    ///
    /// The rule that structured attributes break.
    pub fn of(derivation: &'a Derivation) -> Result<Self, String> {
        let structured = match derivation.environment.get("__json") {
            None => None,
            Some(text) if text.len() > MAX_JSON_BYTES => {
                return Err(format!("__json must not have more than {MAX_JSON_BYTES} bytes, and has {}", text.len()));
            }
            Some(text) => {
                let object = serde_json::from_slice(text);
                Some(object.map_err(|error| format!("__json must be an object in JSON: {error}"))?)
            }
        };
        Ok(Self { derivation, structured })
    }

    /// Whether the builder gets files rather than an environment.
    pub fn are_structured(&self) -> bool {
        self.structured.is_some()
    }

    /// Words; `None` without the attribute.
    ///
    /// # Errors
    ///
    /// It is something else.
    pub fn words(&self, name: &str) -> Result<Option<Vec<String>>, String> {
        match &self.structured {
            Some(object) => object.get(name).map(|value| words(name, value)).transpose(),
            None => self.text(name).map(|text| bounded(name, split(text))).transpose(),
        }
    }

    /// Whether the attribute is true.
    pub fn flag(&self, name: &str) -> bool {
        match &self.structured {
            Some(object) => object.get(name) == Some(&Value::Bool(true)),
            None => self.text(name) == Some("1"),
        }
    }

    /// The files of `exportReferencesGraph`, and the paths whose closures they describe.
    ///
    /// # Errors
    ///
    /// The attribute is something else.
    pub fn graphs(&self) -> Result<Vec<(String, Vec<StorePath>)>, String> {
        let name = "exportReferencesGraph";
        let path = |text: &String| StorePath::parse(text).map_err(|error| format!("a path in {name} {error}"));
        let Some(object) = &self.structured else {
            let words = self.text(name).map(split).unwrap_or_default();
            if !words.len().is_multiple_of(2) {
                return Err(format!("{name} must have a path after each name, not {} words", words.len()));
            }
            return words
                .chunks(2)
                .map(|pair| match is_file_name(&pair[0]) {
                    true => Ok((pair[0].clone(), vec![path(&pair[1])?])),
                    false => Err(format!("{name} must name files by letters, digits and _ - ., not {:?}", pair[0])),
                })
                .collect();
        };
        let Some(graphs) = object.get(name).and_then(Value::as_object) else { return Ok(Vec::new()) };
        let graph = |(key, value): (&String, &Value)| {
            let paths = match value {
                Value::String(text) => vec![text.clone()],
                value => words(name, value)?,
            };
            Ok((key.clone(), paths.iter().map(path).collect::<Result<_, _>>()?))
        };
        graphs.iter().map(graph).collect()
    }

    /// What an output must keep to.
    ///
    /// # Errors
    ///
    /// An attribute has another type.
    pub fn checks(&self, output: &str) -> Result<Checks, String> {
        let Some(object) = &self.structured else {
            return Ok(Checks {
                allowed_references: self.words("allowedReferences")?,
                allowed_requisites: self.words("allowedRequisites")?,
                disallowed_references: self.words("disallowedReferences")?,
                disallowed_requisites: self.words("disallowedRequisites")?,
                ignores_itself: true,
                ..Checks::default()
            });
        };
        let Some(checks) = object.get("outputChecks").and_then(|checks| checks.get(output)) else {
            return Ok(Checks::default());
        };
        let list = |name: &str| checks.get(name).map(|value| words(name, value)).transpose();
        let size = |name: &str| match checks.get(name) {
            None => Ok(None),
            Some(value) => {
                value.as_u64().map(Some).ok_or_else(|| format!("{name} must be a number of bytes, not {value}"))
            }
        };
        Ok(Checks {
            allowed_references: list("allowedReferences")?,
            allowed_requisites: list("allowedRequisites")?,
            disallowed_references: list("disallowedReferences")?,
            disallowed_requisites: list("disallowedRequisites")?,
            max_size: size("maxSize")?,
            max_closure_size: size("maxClosureSize")?,
            ignores_itself: false,
        })
    }

    /// The files of structured attributes, with the graphs in them, and the outputs' paths or what stands for them. `None` if
    /// they are not structured.
    pub fn files(&self, graphs: Vec<(String, Value)>) -> Option<AttributeFiles> {
        let mut object = self.structured.clone()?;
        let path = |(name, output): (&String, &Output)| {
            let path = output.path().map_or_else(|| placeholder(name), ToString::to_string);
            (name.clone(), path.into())
        };
        let outputs = self.derivation.outputs.iter().map(path);
        object.insert("outputs".to_owned(), Value::Object(outputs.collect()));
        object.extend(graphs);
        Some(AttributeFiles { json: json::written(&object), shell: shell::declarations(&object) })
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.derivation.attribute(name)
    }
}

fn split(text: &str) -> Vec<String> {
    text.split_ascii_whitespace().map(str::to_owned).collect()
}

fn words(name: &str, value: &Value) -> Result<Vec<String>, String> {
    let wrong = || format!("{name} must be a list of strings, not {value}");
    let list = value.as_array().ok_or_else(wrong)?;
    let words = list.iter().map(|word| word.as_str().map(str::to_owned).ok_or_else(wrong));
    bounded(name, words.collect::<Result<_, _>>()?)
}

fn bounded(name: &str, words: Vec<String>) -> Result<Vec<String>, String> {
    match words.len() {
        count if count > MAX_WORDS => Err(format!("{name} must not have more than {MAX_WORDS} words, and has {count}")),
        _ => Ok(words),
    }
}

fn is_file_name(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}
