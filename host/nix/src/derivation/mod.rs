mod aterm;
mod modulo;
mod output;
mod resolve;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read,
};

use crate::{
    StorePath,
    wire::{Reader, WireError},
};

pub use aterm::DerivationError;
pub use modulo::Modulo;
pub use output::Output;
pub use resolve::Placeholders;
pub(crate) use resolve::placeholder;

/// A build as Nix describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Derivation {
    /// What it makes, by name.
    pub outputs: BTreeMap<String, Output>,
    /// The derivations whose outputs it needs, and these outputs' names. Empty on the wire, where the outputs' paths are among
    /// `input_sources`.
    pub input_derivations: BTreeMap<StorePath, BTreeSet<String>>,
    /// Paths that it needs.
    pub input_sources: BTreeSet<StorePath>,
    /// What it is built on, as in `x86_64-linux`.
    pub platform: String,
    /// The program.
    pub builder: String,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Its attributes, which are its environment.
    pub environment: BTreeMap<String, Vec<u8>>,
}

impl Derivation {
    /// Reads a derivation without input derivations from the wire.
    ///
    /// # Errors
    ///
    /// A field breaks a rule, or the input ended or failed.
    pub fn read<R: Read>(reader: &mut Reader<R>) -> Result<Self, WireError> {
        let outputs: Vec<_> = reader.list("the outputs", |reader| {
            let name = reader.text("an output's name")?;
            let path = reader.text("an output's path")?;
            let algorithm = reader.text("an output's hash function")?;
            let hash = reader.text("an output's hash")?;
            let output = Output::parse(&path, &algorithm, &hash);
            Ok((name, output.map_err(|rule| WireError::broken("an output", rule))?))
        })?;
        let outputs = unique(outputs).map_err(|rule| WireError::broken("the outputs", rule))?;
        for name in outputs.keys() {
            check_output_name(name).map_err(|rule| WireError::broken("an output's name", rule))?;
        }
        let input_sources = reader.paths("the inputs")?;
        let platform = reader.text("the system")?;
        let builder = reader.text("the builder")?;
        let arguments = reader.texts("the arguments")?;
        let environment = reader.list::<_, Vec<_>>("the environment", |reader| {
            Ok((reader.text("a variable")?, reader.string("a value")?))
        })?;
        let environment = unique(environment).map_err(|rule| WireError::broken("the environment", rule))?;
        let input_derivations = BTreeMap::new();
        Ok(Self { outputs, input_derivations, input_sources, platform, builder, arguments, environment })
    }

    /// An attribute's value, if it is UTF-8.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        std::str::from_utf8(self.environment.get(name)?).ok()
    }
}

/// An output's name becomes part of a store path's.
pub(crate) fn check_output_name(name: &str) -> Result<(), String> {
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"+-._?=".contains(&byte);
    match !name.is_empty() && name.bytes().all(is_good) {
        true => Ok(()),
        false => {
            let name = crate::quoted(name.as_bytes());
            Err(format!("must consist of letters, digits and the characters + - . _ ? =, not {name}"))
        }
    }
}

fn unique<V>(entries: Vec<(String, V)>) -> Result<BTreeMap<String, V>, String> {
    let mut map = BTreeMap::new();
    for (name, value) in entries {
        if map.contains_key(&name) {
            return Err(format!("must not have {} twice", crate::quoted(name.as_bytes())));
        }
        map.insert(name, value);
    }
    Ok(map)
}
