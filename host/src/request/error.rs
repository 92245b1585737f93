use std::fmt;

/// Most characters of a value that an error shows.
const MAX_SHOWN_CHARS: usize = 80;

/// Why a request can't be built: which field breaks which rule with which value.
///
/// Prints as one line, such as `scratch_paths[2] must not hold "." or ".." (got "a/../b")`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct RequestError {
    /// What kind of rule is broken.
    pub kind: RequestErrorKind,
    /// The field with its index, as in `environment_vars[3].key`.
    pub field: String,
    /// The rule, as a sentence that the field is the subject of: "must …".
    pub rule: String,
    /// What the field holds, escaped and shortened; absent where the rule says it all.
    pub value: Option<String>,
}

/// The kinds of rules that a request can break.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestErrorKind {
    /// The bytes are no `BuildRequest` at all.
    Malformed,
    /// A field breaks a rule of the format; nobody could build this.
    Invalid,
    /// The request names something that the store lacks.
    Missing,
    /// The request asks for what this host, or this version, does not offer.
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
    /// `rule` is a sentence that `field` is the subject of: "must …".
    pub fn new(kind: RequestErrorKind, field: impl fmt::Display, rule: impl Into<String>) -> Self {
        Self { kind, field: field.to_string(), rule: rule.into(), value: None }
    }

    /// A broken rule of the format.
    pub(super) fn invalid(field: impl fmt::Display, rule: impl Into<String>) -> Self {
        Self::new(RequestErrorKind::Invalid, field, rule)
    }

    /// Shows a value as it is, for numbers, digests and lengths.
    #[must_use]
    pub fn got(mut self, value: impl fmt::Display) -> Self {
        self.value = Some(value.to_string());
        self
    }

    /// Shows a value that a client made up: quoted, escaped and shortened, so that the error stays one line.
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

/// One short line, whatever the bytes.
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
    fn an_error_is_one_short_line_whatever_the_value() {
        let hostile = "\n\u{1b}[2J\u{202e}".repeat(1000);
        let text = RequestError::invalid("outputs[0]", "must be clean").got_quoted(hostile.as_bytes()).to_string();
        assert!(text.len() < 1000 && !text.contains(char::is_control) && !text.contains('\u{202e}'), "{text}");
        let text = RequestError::invalid("inputs[0].file.name", "must be short").got_quoted(&[0xff; 1000]).to_string();
        assert!(text.len() < 1000 && text.ends_with("…)"), "{text}");
    }

    #[test]
    fn field_rule_and_value_are_told() {
        let error = RequestError::invalid("outputs[1]", "must not be empty");
        assert_eq!(error.to_string(), "outputs[1] must not be empty");
        assert_eq!(error.got_quoted(b"a\tb").to_string(), r#"outputs[1] must not be empty (got "a\tb")"#);
    }
}
