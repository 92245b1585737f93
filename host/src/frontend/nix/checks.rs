//! What a derivation says that its outputs may refer to, and how large they may be.

use std::collections::{BTreeMap, BTreeSet};

use cofferdam_nix::{Attributes, Checks, Graph, StorePath};

/// The paths of a derivation's outputs, by their names.
type Outputs<'a> = BTreeMap<&'a str, &'a StorePath>;

/// Checks the outputs of a derivation. `graph` has them, and all inputs.
///
/// # Errors
///
/// The rule that an output breaks.
pub(super) fn check(outputs: &Outputs<'_>, attributes: &Attributes<'_>, graph: &Graph<'_>) -> Result<(), String> {
    outputs.iter().try_for_each(|(name, path)| check_output(outputs, path, &attributes.checks(name)?, graph))
}

fn check_output(outputs: &Outputs<'_>, path: &StorePath, checks: &Checks, graph: &Graph<'_>) -> Result<(), String> {
    let size = graph.size(&BTreeSet::from([path]));
    if let Some(limit) = checks.max_size.filter(|limit| size > *limit) {
        return Err(format!("path '{path}' is too large at {size} bytes; limit is {limit} bytes"));
    }
    let mut closure = graph.closure([path]);
    let size = graph.size(&closure);
    if let Some(limit) = checks.max_closure_size.filter(|limit| size > *limit) {
        return Err(format!("closure of path '{path}' is too large at {size} bytes; limit is {limit} bytes"));
    }
    if checks.ignores_itself {
        closure.remove(path);
    }
    let references = graph.0.get(path).map(|info| info.references.iter().collect()).unwrap_or_default();
    for (words, is_allowed, used) in [
        (&checks.allowed_references, true, &references),
        (&checks.allowed_requisites, true, &closure),
        (&checks.disallowed_references, false, &references),
        (&checks.disallowed_requisites, false, &closure),
    ] {
        let Some(words) = words else { continue };
        let named = words.iter().map(|word| named(outputs, word)).collect::<Result<BTreeSet<_>, _>>()?;
        let bad: Vec<_> =
            used.iter().filter(|path| named.contains(*path) != is_allowed).map(|path| format!("\n  {path}")).collect();
        if !bad.is_empty() {
            return Err(format!("output '{path}' is not allowed to refer to the following paths:{}", bad.concat()));
        }
    }
    Ok(())
}

/// The path that a word of a check stands for: a store path, or the name of an output.
fn named(outputs: &Outputs<'_>, word: &str) -> Result<StorePath, String> {
    if let Ok(path) = StorePath::parse(word) {
        return Ok(path);
    }
    let path = outputs.get(word).map(|path| (*path).clone());
    path.ok_or_else(|| format!("derivation contains an illegal reference specifier '{word}'"))
}

#[cfg(test)]
mod tests {
    use cofferdam_nix::{Derivation, Hash, PathInfo};

    use super::*;

    fn path(name: &str) -> StorePath {
        StorePath::compute("source", &Hash::of(name.as_bytes()), name).unwrap()
    }

    fn info(references: &[&str]) -> PathInfo {
        PathInfo {
            deriver: None,
            nar_hash: Hash::of(b""),
            nar_size: 100,
            references: references.iter().map(|name| path(name)).collect(),
            registration_time: 0,
            ultimate: true,
            signatures: BTreeSet::new(),
            content_address: None,
        }
    }

    /// Checks an output `out` that refers to itself and to `dev`, which refers to `input`, which refers to `deep`.
    fn checked(environment: &[(&str, &str)]) -> Result<(), String> {
        let paths = ["dev", "out"].map(|name| (name, path(name)));
        let environment = environment.iter().map(|(key, value)| ((*key).to_owned(), (*value).into()));
        let derivation = Derivation { environment: environment.collect(), ..Derivation::default() };
        let known = [
            ("out", info(&["out", "dev"])),
            ("dev", info(&["input"])),
            ("input", info(&["deep"])),
            ("deep", info(&[])),
        ];
        let known = known.map(|(name, info)| (path(name), info));
        let graph = Graph(known.iter().map(|(path, info)| (path, info)).collect());
        let outputs = paths.iter().map(|(name, path)| (*name, path)).collect();
        check(&outputs, &Attributes::of(&derivation).unwrap(), &graph)
    }

    #[test]
    fn references_and_closures_are_checked() {
        let (input, deep) = (path("input").to_string(), path("deep").to_string());
        let all = format!("out dev {input} {deep}");
        for (key, value, is_right) in [
            ("allowedReferences", format!("out dev {input}"), true),
            ("allowedReferences", format!("dev {input}"), false),
            ("allowedReferences", String::new(), false),
            ("allowedRequisites", all.clone(), true),
            // An output may be in its own closure.
            ("allowedRequisites", all.replace("out ", ""), true),
            ("allowedRequisites", all.replace(&deep, ""), false),
            ("disallowedReferences", deep.clone(), true),
            ("disallowedReferences", input.clone(), false),
            ("disallowedRequisites", deep.clone(), false),
            ("disallowedRequisites", path("other").to_string(), true),
        ] {
            let checked = checked(&[(key, &value)]);
            assert_eq!(checked.is_ok(), is_right, "{key} = {value}: {checked:?}");
        }
        let error = checked(&[("disallowedReferences", &input)]).unwrap_err();
        assert_eq!(
            error,
            format!("output '{}' is not allowed to refer to the following paths:\n  {input}", path("dev"))
        );
        let error = checked(&[("allowedReferences", "doc")]).unwrap_err();
        assert_eq!(error, "derivation contains an illegal reference specifier 'doc'");
    }

    #[test]
    fn sizes_are_checked() {
        let with = |checks: &str| checked(&[("__json", &format!("{{\"outputChecks\":{{\"out\":{checks}}}}}"))]);
        with(r#"{"maxSize":100,"maxClosureSize":400}"#).unwrap();
        let error = with(r#"{"maxSize":99}"#).unwrap_err();
        assert_eq!(error, format!("path '{}' is too large at 100 bytes; limit is 99 bytes", path("out")));
        let error = with(r#"{"maxClosureSize":399}"#).unwrap_err();
        assert_eq!(error, format!("closure of path '{}' is too large at 400 bytes; limit is 399 bytes", path("out")));
        // Structured attributes don't exempt an output from its own checks.
        with(r#"{"allowedRequisites":["dev"]}"#).unwrap_err();
    }
}
