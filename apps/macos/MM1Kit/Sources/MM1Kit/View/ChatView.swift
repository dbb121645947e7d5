#if canImport(SwiftUI)
    import SwiftUI
    import UniformTypeIdentifiers

    /// A conversation: drop pictures, ask, read the answer as it is written, stop it.
    public struct ChatView: View {
        private let session: ChatSession
        @State private var draft = Draft()
        @State private var isChoosing = false

        public init(_ session: ChatSession) {
            self.session = session
        }

        public var body: some View {
            VStack(spacing: 0) {
                ScrollView {
                    LazyVStack(alignment: .leading, spacing: 16) {
                        ForEach(session.turns) { TurnView(turn: $0) }
                    }
                    .padding()
                }
                .defaultScrollAnchor(.bottom)
                Divider()
                composer.padding()
            }
            .dropDestination(for: URL.self) { files, _ in
                draft.add(files)
                return true
            }
            .fileImporter(
                isPresented: $isChoosing, allowedContentTypes: [.image],
                allowsMultipleSelection: true
            ) { result in
                if case .success(let files) = result { draft.add(files) }
            }
        }

        private var composer: some View {
            VStack(alignment: .leading, spacing: 8) {
                if let problem = draft.problem ?? session.problem {
                    Label(problem, systemImage: "exclamationmark.triangle")
                        .foregroundStyle(.red)
                        .textSelection(.enabled)
                }
                if !draft.pictures.isEmpty {
                    ScrollView(.horizontal) { chosen }
                }
                HStack(alignment: .bottom) {
                    Button("Pictures", systemImage: "photo.badge.plus") { isChoosing = true }
                        .labelStyle(.iconOnly)
                    TextField("Ask; drop pictures here", text: $draft.text, axis: .vertical)
                        .lineLimit(1...6)
                        .onSubmit(ask)
                    if session.isAnswering {
                        Button("Stop", systemImage: "stop.fill") { session.stop() }
                    } else {
                        Button("Ask", systemImage: "arrow.up", action: ask)
                            .disabled(!draft.isReady)
                    }
                }
            }
        }

        private var chosen: some View {
            HStack {
                ForEach(Array(draft.pictures.enumerated()), id: \.offset) { index, picture in
                    Button {
                        draft.remove(at: index)
                    } label: {
                        Thumbnail(picture: picture, side: 64)
                    }
                    .buttonStyle(.plain)
                    .help("Remove")
                }
            }
        }

        private func ask() {
            guard draft.isReady, !session.isAnswering else { return }
            let question = draft.take()
            session.ask(question.text, question.pictures)
        }
    }

    private struct TurnView: View {
        let turn: ChatSession.Turn

        var body: some View {
            VStack(alignment: .leading, spacing: 6) {
                Text(turn.message.role == .user ? "You" : "Model")
                    .font(.caption)
                    .foregroundStyle(.secondary)
                HStack {
                    ForEach(Array(turn.pictures.enumerated()), id: \.offset) { _, picture in
                        Thumbnail(picture: picture, side: 160)
                    }
                }
                Text(turn.text)
                    .textSelection(.enabled)
            }
        }
    }
#endif
