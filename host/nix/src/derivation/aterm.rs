//! Derivations as text: what a file `….drv` has in it.
//!
//! ```text
//!   Derive([(NAME,PATH,FUNCTION,HASH),…],[(DERIVATION,[OUTPUT,…]),…],[SOURCE,…],SYSTEM,BUILDER,[ARGUMENT,…],[(KEY,VALUE),…])
//! ```

use std::collections::{BTreeMap, BTreeSet};

use super::{Derivation, Output, check_output_name, unique};
use crate::{StorePath, quoted};

/// Why a text is no derivation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("byte {at} of the derivation: {rule}")]
pub struct DerivationError {
    /// Where.
    pub at: usize,
    /// The rule and the value, as in "must be …, not …".
    pub rule: String,
}

type Result<T> = std::result::Result<T, DerivationError>;

impl Derivation {
    /// Reads a derivation's text, to the last byte.
    ///
    /// # Errors
    ///
    /// The first rule that it breaks, and where.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let mut parser = Parser { text, at: 0 };
        parser.expect(b"Derive(")?;
        let outputs = parser.list(|parser| {
            parser.expect(b"(")?;
            let name = parser.text()?;
            let named = check_output_name(&name);
            named.map_err(|rule| parser.broken(format!("an output's name {rule}")))?;
            let mut texts = [const { String::new() }; 3];
            for text in &mut texts {
                parser.expect(b",")?;
                *text = parser.text()?;
            }
            parser.expect(b")")?;
            let [path, function, hash] = texts;
            let output = Output::parse(&path, &function, &hash);
            Ok((name, output.map_err(|rule| parser.broken(format!("an output {rule}")))?))
        })?;
        let outputs = unique(outputs).map_err(|rule| parser.broken(format!("the outputs {rule}")))?;
        parser.expect(b",")?;
        let input_derivations = parser.list(|parser| {
            parser.expect(b"(")?;
            let path = parser.path()?;
            parser.expect(b",")?;
            let names: BTreeSet<String> = parser.list(Parser::text)?.into_iter().collect();
            parser.expect(b")")?;
            Ok((path, names))
        })?;
        let input_derivations: BTreeMap<_, _> = input_derivations.into_iter().collect();
        parser.expect(b",")?;
        let input_sources = parser.list(Parser::path)?.into_iter().collect();
        parser.expect(b",")?;
        let platform = parser.text()?;
        parser.expect(b",")?;
        let builder = parser.text()?;
        parser.expect(b",")?;
        let arguments = parser.list(Parser::text)?;
        parser.expect(b",")?;
        let environment = parser.list(|parser| {
            parser.expect(b"(")?;
            let key = parser.text()?;
            parser.expect(b",")?;
            let value = parser.string()?;
            parser.expect(b")")?;
            Ok((key, value))
        })?;
        let environment = unique(environment).map_err(|rule| parser.broken(format!("the environment {rule}")))?;
        parser.expect(b")")?;
        if parser.at < text.len() {
            return Err(parser.broken("must end here".to_owned()));
        }
        Ok(Self { outputs, input_derivations, input_sources, platform, builder, arguments, environment })
    }

    /// Its text.
    pub fn to_text(&self) -> Vec<u8> {
        let inputs = self.input_derivations.iter().map(|(path, names)| (path.to_string(), names.clone())).collect();
        self.text_with(&inputs, false)
    }

    /// Its text with these names for the derivations that it needs, and without its outputs' paths if they are masked.
    pub(super) fn text_with(&self, inputs: &BTreeMap<String, BTreeSet<String>>, masked: bool) -> Vec<u8> {
        let mut text = Vec::from(*b"Derive(");
        list(&mut text, &self.outputs, |text, (name, output)| {
            let [path, function, hash] = output.texts();
            let path = if masked { "" } else { &path };
            tuple(text, &[name.as_bytes(), path.as_bytes(), function.as_bytes(), hash.as_bytes()]);
        });
        text.push(b',');
        list(&mut text, inputs, |text, (input, names)| {
            text.push(b'(');
            string(text, input.as_bytes());
            text.push(b',');
            list(text, names, |text, name| string(text, name.as_bytes()));
            text.push(b')');
        });
        text.push(b',');
        list(&mut text, &self.input_sources, |text, path| string(text, path.to_string().as_bytes()));
        for word in [&self.platform, &self.builder] {
            text.push(b',');
            string(&mut text, word.as_bytes());
        }
        text.push(b',');
        list(&mut text, &self.arguments, |text, argument| string(text, argument.as_bytes()));
        text.push(b',');
        list(&mut text, &self.environment, |text, (key, value)| {
            let value: &[u8] = if masked && self.outputs.contains_key(key) { b"" } else { value };
            tuple(text, &[key.as_bytes(), value]);
        });
        text.push(b')');
        text
    }
}

fn list<T>(text: &mut Vec<u8>, elements: impl IntoIterator<Item = T>, mut write: impl FnMut(&mut Vec<u8>, T)) {
    text.push(b'[');
    for (at, element) in elements.into_iter().enumerate() {
        if at > 0 {
            text.push(b',');
        }
        write(text, element);
    }
    text.push(b']');
}

fn tuple(text: &mut Vec<u8>, strings: &[&[u8]]) {
    text.push(b'(');
    for (at, bytes) in strings.iter().enumerate() {
        if at > 0 {
            text.push(b',');
        }
        string(text, bytes);
    }
    text.push(b')');
}

fn string(text: &mut Vec<u8>, bytes: &[u8]) {
    text.push(b'"');
    for &byte in bytes {
        match byte {
            b'"' | b'\\' => text.extend([b'\\', byte]),
            b'\n' => text.extend(b"\\n"),
            b'\r' => text.extend(b"\\r"),
            b'\t' => text.extend(b"\\t"),
            _ => text.push(byte),
        }
    }
    text.push(b'"');
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn broken(&self, rule: String) -> DerivationError {
        DerivationError { at: self.at, rule }
    }

    fn expect(&mut self, expected: &[u8]) -> Result<()> {
        let rest = &self.text[self.at..];
        if rest.starts_with(expected) {
            self.at += expected.len();
            return Ok(());
        }
        let found = quoted(&rest[..rest.len().min(expected.len())]);
        Err(self.broken(format!("must be {}, not {found}", quoted(expected))))
    }

    fn list<T>(&mut self, mut element: impl FnMut(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        self.expect(b"[")?;
        let mut elements = Vec::new();
        while self.text.get(self.at) != Some(&b']') {
            if !elements.is_empty() {
                self.expect(b",")?;
            }
            elements.push(element(self)?);
        }
        self.at += 1;
        Ok(elements)
    }

    fn string(&mut self) -> Result<Vec<u8>> {
        self.expect(b"\"")?;
        let mut bytes = Vec::new();
        let cut = "must be more: the text ends in a string";
        loop {
            let Some(&byte) = self.text.get(self.at) else { return Err(self.broken(cut.to_owned())) };
            self.at += 1;
            match byte {
                b'"' => return Ok(bytes),
                b'\\' => {
                    let Some(&escaped) = self.text.get(self.at) else { return Err(self.broken(cut.to_owned())) };
                    self.at += 1;
                    bytes.push(match escaped {
                        b'n' => b'\n',
                        b'r' => b'\r',
                        b't' => b'\t',
                        other => other,
                    });
                }
                _ => bytes.push(byte),
            }
        }
    }

    fn text(&mut self) -> Result<String> {
        let string = self.string()?;
        String::from_utf8(string)
            .map_err(|error| self.broken(format!("must follow UTF-8, not {}", quoted(error.as_bytes()))))
    }

    fn path(&mut self) -> Result<StorePath> {
        let text = self.text()?;
        StorePath::parse(&text).map_err(|error| self.broken(format!("a path {error}")))
    }
}
