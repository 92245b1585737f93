use std::{collections::BTreeSet, fmt};

use crate::{StorePath, protocol::Version, quoted};

/// What a client wants to be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DerivedPath {
    /// A path.
    Opaque(StorePath),
    /// What a derivation makes.
    Built {
        /// The derivation.
        derivation: StorePath,
        /// Which outputs.
        outputs: OutputNames,
    },
}

/// Some outputs of a derivation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputNames {
    /// All of them.
    All,
    /// Those with these names.
    These(BTreeSet<String>),
}

impl DerivedPath {
    /// Reads a path, `….drv!*` or `….drv!out,dev` of a client of this version.
    ///
    /// # Errors
    ///
    /// The rule that it breaks.
    pub fn parse(text: &str, version: Version) -> Result<Self, String> {
        let path = |text| StorePath::parse(text).map_err(|error| error.to_string());
        let Some((derivation, outputs)) = text.split_once('!') else {
            let path = path(text)?;
            // Older clients have no other word for all outputs.
            return Ok(match version < Version::minor(30) && path.is_derivation() {
                true => Self::Built { derivation: path, outputs: OutputNames::All },
                false => Self::Opaque(path),
            });
        };
        let derivation = path(derivation)?;
        if !derivation.is_derivation() {
            return Err(format!("must name outputs of a derivation, not of {}", quoted(text.as_bytes())));
        }
        if outputs == "*" {
            return Ok(Self::Built { derivation, outputs: OutputNames::All });
        }
        let names: BTreeSet<_> = outputs.split(',').map(str::to_owned).collect();
        for name in &names {
            crate::derivation::check_output_name(name).map_err(|rule| format!("an output's name {rule}"))?;
        }
        Ok(Self::Built { derivation, outputs: OutputNames::These(names) })
    }
}

impl fmt::Display for DerivedPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Opaque(path) => path.fmt(f),
            Self::Built { derivation, outputs: OutputNames::All } => write!(f, "{derivation}!*"),
            Self::Built { derivation, outputs: OutputNames::These(names) } => {
                write!(f, "{derivation}!{}", names.iter().map(String::as_str).collect::<Vec<_>>().join(","))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DERIVATION: &str = "/nix/store/0sbm8kqi5zyp3iyc6allh3lj0rygk0fw-first.drv";

    #[test]
    fn what_is_wanted_is_read_as_it_is_displayed() {
        for text in [
            DERIVATION.to_owned(),
            format!("{DERIVATION}!*"),
            format!("{DERIVATION}!dev,out"),
            DERIVATION.replace(".drv", ""),
        ] {
            assert_eq!(DerivedPath::parse(&text, Version::minor(30)).unwrap().to_string(), text);
        }
        let all = DerivedPath::parse(DERIVATION, Version::minor(29)).unwrap();
        assert_eq!(all.to_string(), format!("{DERIVATION}!*"));
    }

    #[test]
    fn other_texts_are_refused_with_the_rule() {
        let path = DERIVATION.replace(".drv", "");
        for (wrong, rule) in [
            (String::new(), "must lie in /nix/store"),
            (format!("{path}!out"), "must name outputs of a derivation"),
            (format!("{DERIVATION}!"), "an output's name must consist of"),
            (format!("{DERIVATION}!out,"), "an output's name must consist of"),
            (format!("{DERIVATION}!out!out"), "an output's name must consist of"),
        ] {
            let error = DerivedPath::parse(&wrong, Version::NEWEST).unwrap_err();
            assert!(error.contains(rule), "{wrong}: {error}");
        }
    }
}
