#if os(macOS) || os(Linux)
    import Foundation

    /// Why there is no server.
    public enum MM1ServerError: Error, Sendable, Hashable {
        /// No `mm1` at any of these paths.
        case notFound([String])
        /// The system did not run it.
        case notLaunched(String)
        /// Another program listens at the port.
        case portTaken(UInt16)
        /// It ended; the message is the last line that it said.
        case exited(Exit, message: String)
        /// It did not serve in time.
        case notReady(Duration)
        /// It ran, but answered no longer.
        case unresponsive
        /// ``MM1Server/stop()`` was called, or start never was.
        case stopped
    }

    /// How a process ended.
    public enum Exit: Sendable, Hashable {
        case status(Int32)
        case signal(Int32)
    }

    extension MM1ServerError: LocalizedError {
        public var errorDescription: String? {
            switch self {
            case .notFound(let paths):
                "mm1 is at none of \(paths.joined(separator: ", ")); install it with "
                    + "pip install \"mm1-mlx[server]\", or name it by MM1_EXECUTABLE"
            case .notLaunched(let reason): "mm1 cannot be run: \(reason)"
            case .portTaken(let port): "another program listens at port \(port)"
            case .exited(.status(let status), let message):
                "mm1 serve ended with status \(status): \(message)"
            case .exited(.signal(let signal), let message):
                "mm1 serve was ended by signal \(signal): \(message)"
            case .notReady(let limit): "mm1 serve was not ready after \(limit)"
            case .unresponsive: "mm1 serve no longer answered"
            case .stopped: "the server is stopped"
            }
        }
    }
#endif
