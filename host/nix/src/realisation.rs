use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::{Algorithm, Hash, StorePath, derivation::check_output_name, quoted};

/// Bytes of the largest realisation in JSON.
const MAX_JSON_BYTES: usize = 64 * 1024;

/// An output of a derivation, whatever the path of that one: as in `sha256:0123…!out`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct OutputId {
    /// The hash of the derivation without its outputs' paths.
    pub derivation: Hash,
    /// The output's name.
    pub output: String,
}

impl fmt::Display for OutputId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}!{}", self.derivation.algorithm().name(), self.derivation.base16(), self.output)
    }
}

impl FromStr for OutputId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = || {
            let (hash, output) = text.split_once('!')?;
            let hash = hash.strip_prefix("sha256:")?;
            check_output_name(output).ok()?;
            let id = Self { derivation: Hash::parse(Algorithm::Sha256, hash).ok()?, output: output.to_owned() };
            // One output has one name.
            (id.to_string() == text).then_some(id)
        };
        parsed()
            .ok_or_else(|| format!("must be an output such as \"sha256:HASH!out\", not {}", quoted(text.as_bytes())))
    }
}

/// What an output of a derivation has become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Realisation {
    /// The output.
    pub id: OutputId,
    /// Its path.
    pub path: StorePath,
    /// As in `KEY:BASE64`.
    pub signatures: BTreeSet<String>,
    /// What the outputs have become that this one refers to. Only some versions of Nix say it.
    pub dependencies: BTreeMap<OutputId, StorePath>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Json {
    id: String,
    out_path: String,
    #[serde(default)]
    signatures: BTreeSet<String>,
    #[serde(default)]
    dependent_realisations: BTreeMap<String, String>,
}

impl Realisation {
    /// One without signatures.
    pub fn new(id: OutputId, path: StorePath) -> Self {
        Self { id, path, signatures: BTreeSet::new(), dependencies: BTreeMap::new() }
    }

    /// Reads it.
    ///
    /// # Errors
    ///
    /// The rule that it breaks.
    pub fn from_json(text: &str) -> Result<Self, String> {
        if text.len() > MAX_JSON_BYTES {
            return Err(format!("must have at most {MAX_JSON_BYTES} bytes, not {}", text.len()));
        }
        let json: Json = serde_json::from_str(text)
            .map_err(|error| format!("must be a realisation in JSON, not {}: {error}", quoted(text.as_bytes())))?;
        let path = |text: &str| StorePath::from_base_name(text).map_err(|error| format!("has a path that {error}"));
        let id = |text: &str| text.parse::<OutputId>().map_err(|rule| format!("has an id that {rule}"));
        let dependency = |(name, found): (&String, &String)| Ok::<_, String>((id(name)?, path(found)?));
        Ok(Self {
            id: id(&json.id)?,
            path: path(&json.out_path)?,
            signatures: json.signatures,
            dependencies: json.dependent_realisations.iter().map(dependency).collect::<Result<_, _>>()?,
        })
    }

    /// As Nix writes it.
    pub fn to_json(&self) -> String {
        let mut json = self.unsigned();
        json["signatures"] = json!(self.signatures);
        json.to_string()
    }

    /// What a signature of it signs.
    pub fn fingerprint(&self) -> String {
        self.unsigned().to_string()
    }

    fn unsigned(&self) -> Value {
        let dependency = |(id, path): (&OutputId, &StorePath)| (id.to_string(), path.base_name().into());
        let dependencies: serde_json::Map<_, _> = self.dependencies.iter().map(dependency).collect();
        json!({ "dependentRealisations": dependencies, "id": self.id.to_string(), "outPath": self.path.base_name() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &str = r#"{"dependentRealisations":{"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855!dev":"ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-a-dev"},"id":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855!out","outPath":"ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-a","signatures":["a:b"]}"#;

    #[test]
    fn the_json_of_nix_is_read_and_written_again() {
        let realisation = Realisation::from_json(JSON).unwrap();
        assert_eq!(realisation.to_json(), JSON);
        assert_eq!(realisation.fingerprint(), JSON.replace(r#","signatures":["a:b"]"#, ""));
        let short = format!(r#"{{"id":"{}","outPath":"{}"}}"#, realisation.id, realisation.path.base_name());
        assert_eq!(
            Realisation::from_json(&short).unwrap(),
            Realisation::new(realisation.id.clone(), realisation.path.clone())
        );
    }

    #[test]
    fn other_texts_are_refused_with_the_rule() {
        let long = "a".repeat(MAX_JSON_BYTES);
        for (from, to, rule) in [
            ("{", "[", "must be a realisation in JSON"),
            ("outPath", "path", "must be a realisation in JSON"),
            ("\"outPath\"", "\"id\":\"\",\"outPath\"", "duplicate field"),
            ("[\"a:b\"]", "{}", "must be a realisation in JSON"),
            ("-a\"", "/a\"", "has a path that must have a dash"),
            ("ifd3", "../ifd3", "has a path that must begin with 32 digits"),
            ("!out", "", "has an id that must be an output such as"),
            ("!out", "!..//", "has an id that must be an output such as"),
            ("sha256:e3b0", "sha256:E3B0", "has an id that must be an output such as"),
            ("sha256:e3b0", "sha512:e3b0", "has an id that must be an output such as"),
            ("a:b", &long, "must have at most 65536 bytes"),
        ] {
            let error = Realisation::from_json(&JSON.replace(from, to)).unwrap_err();
            assert!(error.contains(rule), "{to}: {error}");
        }
        let nested = "[".repeat(60_000);
        assert!(Realisation::from_json(&nested).unwrap_err().contains("must be a realisation in JSON"));
    }
}
