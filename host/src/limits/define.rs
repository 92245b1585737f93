//! Makes [`Limits`](super::Limits), and all that is read or sent of them, from one table.

use std::{fmt::Display, time::Duration};

use crate::{
    quantity::{millis, show_size},
    request::{RequestError, RequestErrorKind},
};

/// The value of a limit.
pub(crate) trait Amount: Copy + PartialOrd {
    /// As a number on the wire: bytes, a count, or milliseconds.
    fn number(self) -> u64;
    /// From a number on the wire, which this type can hold.
    fn of(number: u64) -> Self;
    /// For messages.
    fn show(self) -> impl Display;
}

/// Bytes.
impl Amount for u64 {
    fn number(self) -> u64 {
        self
    }

    fn of(number: u64) -> Self {
        number
    }

    fn show(self) -> impl Display {
        show_size(self)
    }
}

/// A count.
impl Amount for u32 {
    fn number(self) -> u64 {
        self.into()
    }

    fn of(number: u64) -> Self {
        Self::try_from(number).unwrap_or(Self::MAX)
    }

    fn show(self) -> impl Display {
        self
    }
}

impl Amount for Duration {
    fn number(self) -> u64 {
        millis(self)
    }

    fn of(number: u64) -> Self {
        Self::from_millis(number)
    }

    fn show(self) -> impl Display {
        humantime::format_duration(self)
    }
}

/// The rule that a value breaks, if it is out of bounds.
pub(super) fn broken_rule<A: Amount>(value: A, least: A, most: A) -> Option<String> {
    let is_within = (least..=most).contains(&value);
    (!is_within).then(|| format!("must be from {} to {}", least.show(), most.show()))
}

/// A limit as a client asks for it.
pub(super) fn lowered<A: Amount>(field: &str, asked: u64, default: A, least: A, most: A) -> Result<A, RequestError> {
    if asked == 0 {
        return Ok(default);
    }
    if (least.number()..=most.number()).contains(&asked) {
        return Ok(A::of(asked));
    }
    let of_type = A::of(asked);
    // A value must not look like the bound that it exceeds.
    let shown = of_type.show().to_string();
    let is_clear = of_type.number() == asked && ![least, most].map(|bound| bound.show().to_string()).contains(&shown);
    let shown = if is_clear { shown } else { asked.to_string() };
    Err(not_allowed(&format!("limits.{field}"), shown, least, most))
}

/// What a client asks for, if its daemon allows it.
///
/// # Errors
///
/// It is out of bounds.
pub(crate) fn allowed<A: Amount>(field: &str, asked: A, least: A, most: A) -> Result<A, RequestError> {
    if (least..=most).contains(&asked) {
        return Ok(asked);
    }
    Err(not_allowed(field, asked.show(), least, most))
}

fn not_allowed<A: Amount>(field: &str, asked: impl Display, least: A, most: A) -> RequestError {
    let rule = format!("must be from {} to {}, which is what this daemon allows, or 0", least.show(), most.show());
    RequestError::new(RequestErrorKind::Unsupported, field, rule).got(asked)
}

/// One entry for each limit. Its last lines are a field of [`Asked`](super::Asked), from whose name the flag and the key
/// are made, and the text before the field is the flag's help. `wire` is its field in the message `Limits`.
macro_rules! limits {
    ($(
        $(#[doc = $doc:literal])*
        $limit:ident: $amount:ty {
            default: $default:expr,
            least: $least:expr,
            most: $most:expr,
            visible: $visible:expr,
            wire: $wire:ident,
            $(#[$flag:meta])*
            $setting:ident: $value:ty,
        }
    )*) => {
        /// The limits of one build.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) struct Limits {
            $($(#[doc = $doc])* pub $limit: $amount,)*
        }

        impl Default for Limits {
            fn default() -> Self {
                Self { $($limit: $default,)* }
            }
        }

        impl Limits {
            /// The least that can be asked for.
            pub(crate) const LEAST: Self = Self { $($limit: $least,)* };

            /// The most that can be asked for on any host.
            pub(crate) const MOST: Self = Self { $($limit: $most,)* };

            /// These, except for those that are asked for.
            #[must_use]
            pub(crate) fn with(&self, asked: &Asked) -> Self {
                Self { $($limit: asked.$setting.map_or(self.$limit, Into::into),)* }
            }

            /// These, except for those that a client asks for.
            ///
            /// # Errors
            ///
            /// The first one that is more than `most`, or less than any build can have.
            pub(crate) fn lowered(&self, asked: &wire::Limits, most: &Self) -> Result<Self, RequestError> {
                Ok(Self {
                    $($limit: define::lowered(
                        stringify!($wire),
                        asked.$wire.number(),
                        self.$limit,
                        Self::LEAST.$limit,
                        most.$limit,
                    )?,)*
                })
            }

            /// The settings that are out of bounds, each with its name and the rule that it breaks.
            pub(crate) fn broken_rules(&self, most: &Self) -> Vec<(&'static str, String)> {
                let rules = [$((
                    stringify!($setting),
                    define::broken_rule(self.$limit, Self::LEAST.$limit, most.$limit),
                ),)*];
                rules.into_iter().filter_map(|(name, rule)| Some((name, rule?))).collect()
            }

            /// Those that a build can see: under limits that agree in them, equal requests make equal builds.
            pub(crate) fn visible(&self) -> impl Iterator<Item = u64> {
                [$(($visible, self.$limit.number()),)*].into_iter().filter_map(|(seen, number)| seen.then_some(number))
            }

            /// Each limit's setting and field on the wire.
            #[cfg(test)]
            const NAMES: &[(&str, &str)] = &[$((stringify!($setting), stringify!($wire)),)*];
        }

        /// What is asked of a build, by the flags of a command or by `[build]` in the configuration of a daemon. `None`
        /// stands for the default.
        #[derive(Debug, Clone, Default, PartialEq, Eq, Args, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub(crate) struct Asked {
            $($(#[$flag])* pub(crate) $setting: Option<$value>,)*
            /// If the build fails, keep its scratch directories in the store, and print their node
            #[arg(long, help_heading = "Results")]
            pub(crate) keep_failed: bool,
            /// If the build fails, open a shell in its machine, on this terminal. Until the shell ends, programs in it control the
            /// terminal, as over ssh
            #[arg(long, help_heading = "Results")]
            #[serde(skip)]
            pub(crate) shell_on_failure: bool,
            /// Maximum time of the shell [default: 1h]
            #[arg(long, value_name = "DUR", requires = "shell_on_failure", help_heading = "Results")]
            shell_timeout: Option<Time>,
        }

        impl From<&Asked> for wire::Limits {
            fn from(asked: &Asked) -> Self {
                Self {
                    $($wire: Amount::of(asked.$setting.map_or(0, |value| <$amount>::from(value).number())),)*
                }
            }
        }
    };
}
