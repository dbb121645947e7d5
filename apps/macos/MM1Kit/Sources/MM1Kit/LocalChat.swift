#if os(macOS) || os(Linux)
    import Foundation

    #if canImport(Darwin)
        import Observation
    #endif

    /// A model on this machine and a conversation with it: what an app's window shows.
    // As of ChatSession: nothing observes it on Linux.
    #if canImport(Darwin)
        @Observable
    #endif
    @MainActor
    public final class LocalChat {
        public let session: ChatSession
        /// What the server is doing.
        public private(set) var state: MM1Server.State

        private let server: MM1Server

        /// Nothing is started yet: ``start()`` does, or the first question.
        public init(
            _ options: MM1Server.Options = MM1Server.Options(),
            answers: AnswerOptions = AnswerOptions()
        ) {
            let server = MM1Server(options)
            self.server = server
            state = server.state
            session = ChatSession(options: answers) { try await server.start() }
            let states = server.states
            Task { [weak self] in
                for await state in states { self?.state = state }
            }
        }

        /// Starts the server, and waits until it answers or ``state`` says why it does not.
        public func start() async {
            _ = try? await server.start()
        }

        /// Ends the answer that is being written and the server, and starts it again.
        public func restart() async {
            await stop()
            await start()
        }

        /// Ends the answer that is being written, and the server.
        public func stop() async {
            await session.stop()?.value
            await server.stop()
        }
    }

    extension MM1Server.State: CustomStringConvertible {
        /// A line for people.
        public var description: String {
            switch self {
            case .starting: "starting"
            case .running(let running): "\(running.model) is ready"
            case .restarting(let delay, let reason): "starting again in \(delay): \(reason.line)"
            case .failed(let reason): reason.line
            case .stopped: "stopped"
            }
        }
    }

    extension MM1ServerError {
        fileprivate var line: String { localizedDescription }
    }
#endif
