//! Attributes as declarations of bash.

use serde_json::{Map, Number, Value};

pub(super) fn declarations(object: &Map<String, Value>) -> Vec<u8> {
    let mut text = String::new();
    for (name, value) in object.iter().filter(|(name, _)| is_variable(name)) {
        if let Some(declared) = declaration(name, value) {
            text.push_str(&declared);
        }
    }
    text.into_bytes()
}

/// `None` for a value that a shell can't have.
fn declaration(name: &str, value: &Value) -> Option<String> {
    Some(match value {
        Value::Array(list) => {
            let words: Vec<_> = list.iter().map(|value| Some(word(value)? + " ")).collect::<Option<_>>()?;
            format!("declare -a {name}=({})\n", words.concat())
        }
        Value::Object(object) => {
            let entry = |(key, value): (&String, &Value)| Some(format!("[{}]={} ", quoted(key), word(value)?));
            let entries: Vec<_> = object.iter().map(entry).collect::<Option<_>>()?;
            format!("declare -A {name}=({})\n", entries.concat())
        }
        value => format!("declare {name}={}\n", word(value)?),
    })
}

fn word(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(quoted(text)),
        Value::Number(number) => integer(number).map(|integer| integer.to_string()),
        Value::Null => Some("''".to_owned()),
        Value::Bool(value) => Some(if *value { "1" } else { "" }.to_owned()),
        Value::Array(_) | Value::Object(_) => None,
    }
}

/// Nix keeps the 32 low bits of integers. Of other numbers it leaves out those that a `float` doesn't show as whole.
#[expect(clippy::cast_possible_truncation, reason = "as Nix does")]
fn integer(number: &Number) -> Option<i32> {
    if let Some(integer) = number.as_i64() {
        return Some(integer as i32);
    }
    if let Some(integer) = number.as_u64() {
        return Some(integer as i32);
    }
    let value = number.as_f64()?;
    let rounded = value as f32;
    let is_whole = rounded.ceil() == rounded;
    // What a conversion gives that overflows.
    let fits = value > f64::from(i32::MIN) - 1.0 && value < f64::from(i32::MAX) + 1.0;
    is_whole.then_some(if fits { value as i32 } else { i32::MIN })
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

fn is_variable(name: &str) -> bool {
    !name.starts_with(|first: char| first.is_ascii_digit())
        && !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}
