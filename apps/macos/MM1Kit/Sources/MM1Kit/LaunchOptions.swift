#if os(macOS) || os(Linux)
    import Foundation

    extension MM1Server {
        /// How a server is started and kept.
        public struct Options: Sendable {
            /// Where a server listens; always at this machine's own address alone.
            public enum Port: Sendable, Hashable {
                /// One that is free.
                case any
                /// This one, or none.
                case exactly(UInt16)
                /// This one, or another if it is taken.
                case preferring(UInt16)
            }

            /// What is run; nil looks for it, see ``Command/find(environment:)``.
            public var command: Command?
            /// A model folder or a hub repository, nil for `$MM1_MODEL` or the embedded model.
            public var model: String?
            /// More flags of `mm1 serve`, such as `--no-log` or `--idle-unload 600`.
            public var arguments: [String] = []
            /// Added to the app's own environment.
            public var environment: [String: String] = [:]
            public var port: Port = .any
            /// How long a start may take, reading the model included.
            public var startTimeout: Duration = .seconds(600)
            /// How often a running server is asked whether it is well; after three silences,
            /// each as long, it is killed and started again.
            public var pulse: Duration = .seconds(10)
            /// How long answers under way may take when the server is stopped.
            public var grace: Duration = .seconds(5)
            public var backoff = Backoff()
            /// Takes the server's lines, and what is done about it; called from any thread.
            public var log: @Sendable (String) -> Void = { _ in }

            public init(model: String? = nil) {
                self.model = model
            }

            /// What a child's environment begins with.
            var inherited: [String: String] {
                ProcessInfo.processInfo.environment.merging(environment) { $1 }
            }
        }

        /// When a server that died is started again.
        public struct Backoff: Sendable, Hashable {
            /// The first wait; each later one is twice as long.
            public var first: Duration = .milliseconds(500)
            /// The longest.
            public var longest: Duration = .seconds(30)
            /// Deaths in a row after which it is given up.
            public var attempts = 6
            /// A server that ran this long has recovered: its death is the first in a row.
            public var recovery: Duration = .seconds(60)

            public init() {}

            /// The wait after so many deaths in a row, nil where it is given up.
            func delay(after deaths: Int) -> Duration? {
                guard deaths <= attempts else { return nil }
                var delay = first
                for _ in 1..<max(deaths, 1) where delay < longest { delay *= 2 }
                return min(delay, longest)
            }
        }
    }
#endif
