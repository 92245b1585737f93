use std::fmt;

/// Most characters of a value that an error shows.
const MAX_SHOWN_CHARS: usize = 80;

/// Why a request can't be built: the field, the rule that it breaks, and the value.
///
/// Prints as one line, such as `scratch_paths[2] must not hold "." or ".." (got "a/../b")`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct RequestError {
    /// What kind of rule is broken.
    pub kind: RequestErrorKind,
    /// The field with its index, as in `environment_vars[3].key`.
    pub field: String,
    /// The rule, as the rest of a sentence with the field as its subject: "must …".
    pub rule: String,
    /// The field's value, escaped and shortened; absent if the rule says enough.
    pub value: Option<String>,
}

/// The kinds of rules that a request can break.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestErrorKind {
    /// The bytes are not a `BuildRequest`.
    Malformed,
    /// A field breaks a rule of the format.
    Invalid,
    /// The store lacks an input.
    Missing,
    /// The request asks for something that this host or this version doesn't offer.
    Unsupported,
}

impl RequestErrorKind {
    /// A word for machines, stable across versions.
    pub fn code(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Invalid => "invalid",
            Self::Missing => "missing",
            Self::Unsupported => "unsupported",
        }
    }
}

impl RequestError {
    /// `rule` is the rest of a sentence with `field` as its subject: "must …".
    pub fn new(kind: RequestErrorKind, field: impl fmt::Display, rule: impl Into<String>) -> Self {
        Self { kind, field: field.to_string(), rule: rule.into(), value: None }
    }

    /// A broken rule of the format.
    pub(super) fn invalid(field: impl fmt::Display, rule: impl Into<String>) -> Self {
        Self::new(RequestErrorKind::Invalid, field, rule)
    }

    /// Adds a value as it is: a number, a digest, a length.
    #[must_use]
    pub fn got(mut self, value: impl fmt::Display) -> Self {
        self.value = Some(value.to_string());
        self
    }

    /// Adds a value from a client: quoted, escaped and shortened to one line.
    #[must_use]
    pub fn got_quoted(self, value: &[u8]) -> Self {
        self.got(quoted(value))
    }
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.field, self.rule)?;
        match &self.value {
            Some(value) => write!(f, " (got {value})"),
            None => Ok(()),
        }
    }
}

/// Any bytes as one short line.
pub(super) fn quoted(value: &[u8]) -> String {
    let Ok(text) = str::from_utf8(value) else {
        let shown = &value[..value.len().min(MAX_SHOWN_CHARS)];
        return format!("\"{}\"{}", shown.escape_ascii(), if shown.len() < value.len() { "…" } else { "" });
    };
    match text.char_indices().nth(MAX_SHOWN_CHARS) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_short_line_for_any_value() {
        let hostile = "\n\u{1b}[2J\u{202e}".repeat(1000);
        let text = RequestError::invalid("outputs[0]", "must be clean").got_quoted(hostile.as_bytes()).to_string();
        assert!(text.len() < 1000 && !text.contains(char::is_control) && !text.contains('\u{202e}'), "{text}");
        let text = RequestError::invalid("inputs[0].file.name", "must be short").got_quoted(&[0xff; 1000]).to_string();
        assert!(text.len() < 1000 && text.ends_with("…)"), "{text}");
    }

    #[test]
    fn an_error_names_field_rule_and_value() {
        let error = RequestError::invalid("outputs[1]", "must not be empty");
        assert_eq!(error.to_string(), "outputs[1] must not be empty");
        assert_eq!(error.got_quoted(b"a\tb").to_string(), r#"outputs[1] must not be empty (got "a\tb")"#);
    }
}
