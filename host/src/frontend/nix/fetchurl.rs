//! `builtin:fetchurl`, a builder of Nix's own, which it sends to other hosts with `-j0`. Here it is a command of the guest's shell.
//!
//! Nobody checks the server's certificate: the output's hash says what was meant.

use super::request::Prepared;

const NAME: &str = "builtin:fetchurl";

/// `wget` is one of the shell's own commands.
const SCRIPT: &str = r#"wget -q -O "$out" "$url"; if [ "$executable" = 1 ]; then chmod 755 "$out"; fi"#;

/// The command of a derivation with a builder of Nix's own.
///
/// # Errors
///
/// What can't be built here.
pub(super) fn command(prepared: &Prepared<'_>) -> Result<Vec<String>, String> {
    let builder = &prepared.derivation.builder;
    if builder != NAME {
        return Err(format!(
            "the builder must be a program or {NAME:?}, not {builder:?}: build it where Nix is, without -j0"
        ));
    }
    if !prepared.is_fixed() {
        return Err(format!("a derivation of {NAME:?} must have a fixed output"));
    }
    if prepared.attributes.are_structured() {
        return Err(format!("a derivation of {NAME:?} must not have structured attributes here"));
    }
    if prepared.attributes.flag("unpack") {
        return Err(format!("unpack must not be set for {NAME:?} here: build it where Nix is, without -j0"));
    }
    Ok(["/bin/sh", "-ec", SCRIPT].map(str::to_owned).into())
}
