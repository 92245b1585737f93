//! Paths and questions in addresses of pages. Names in outputs are bytes, and may be any but a slash and NUL.

use cofferdam_castore::PathComponent;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use tonic::codegen::http::Uri;

use super::answer::Problem;

/// What may stand in an address as it is.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Most bytes of a question's value.
const MAX_VALUE_BYTES: usize = 1024;

/// A name as a part of an address.
pub(super) fn encoded(name: &[u8]) -> String {
    percent_encode(name, ENCODED).to_string()
}

/// The parts of an address's path, still encoded.
pub(super) fn parts(uri: &Uri) -> Vec<&str> {
    uri.path().trim_start_matches('/').split('/').collect()
}

/// A part as a name of an output's directory.
pub(super) fn name(part: &str) -> Result<PathComponent, Problem> {
    let bytes: Vec<u8> = percent_decode_str(part).collect();
    let shown = bytes.escape_ascii().to_string();
    PathComponent::try_from(bytes.as_slice())
        .map_err(|error| Problem::wrong(format!("\"{shown}\" names nothing below an output: {error}")))
}

/// The values of a question, such as `?q=text&before=id`. Of equal names the first counts.
#[derive(Debug, Default)]
pub(super) struct Question(Vec<(String, String)>);

impl Question {
    pub(super) fn of(uri: &Uri) -> Result<Self, Problem> {
        Self::parse(uri.query().unwrap_or_default())
    }

    pub(super) fn parse(text: &str) -> Result<Self, Problem> {
        let decoded = |part: &str| {
            let spaced = part.replace('+', " ");
            let text = percent_decode_str(&spaced).decode_utf8_lossy().into_owned();
            match text.len() > MAX_VALUE_BYTES {
                true => {
                    Err(Problem::wrong(format!("a value in the address must have at most {MAX_VALUE_BYTES} bytes")))
                }
                false => Ok(text),
            }
        };
        let pairs = text.split('&').filter(|pair| !pair.is_empty()).take(32);
        let pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        pairs.map(|(name, value)| Ok((decoded(name)?, decoded(value)?))).collect::<Result<_, _>>().map(Self)
    }

    /// A value, if there is one that is not empty.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(found, _)| found == name);
        found.map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(found, _)| found == name)
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<u64>, Problem> {
        let parse = |value: &str| value.parse().map_err(|_| Problem::wrong(format!("{name} must be a number")));
        self.get(name).map(parse).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_as_they_were_and_none_leads_out() {
        for bytes in [b"a b%2f".as_slice(), b"\xff\n<script>", "ü".as_bytes(), b"..."] {
            let part = encoded(bytes);
            assert!(part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~%".contains(&byte)), "{part}");
            assert_eq!(name(&part).unwrap().as_bytes(), bytes);
        }
        for part in ["..", "%2e%2e", ".%2E", ".", "", "a%2fb", "..%2f..%2fetc", "a%00"] {
            let error = name(part).unwrap_err();
            assert!(error.message.contains("names nothing below an output"), "{error:?}");
        }
    }

    #[test]
    fn a_question_is_decoded_and_bounded() {
        let question = Question::parse("q=a+b%26&state=&n=7&q=other&live").unwrap();
        assert_eq!((question.get("q"), question.get("state")), (Some("a b&"), None));
        assert_eq!(question.number("n").unwrap(), Some(7));
        assert!(question.has("live") && !question.has("x"));
        assert!(question.number("q").is_err());
        assert!(Question::parse(&format!("q={}", "x".repeat(2000))).is_err());
    }
}
